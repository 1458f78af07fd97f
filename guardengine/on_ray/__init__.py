"""guardengine.on_ray: serving and annotating on several machines, with Ray. `pip install 'guardengine[ray]'`."""
