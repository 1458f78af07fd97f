"""guardengine.on_ray: serving and annotating on several machines, with Ray. Needs the extra `ray`."""
