"""guardengine.on_ray: serving and annotating on more than one machine, by Ray. `pip install 'guardengine[ray]'`."""
