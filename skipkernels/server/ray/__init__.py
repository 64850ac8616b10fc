"""The server's workers on a Ray cluster: one deployment for the scheduler, one for each replica of the model.

The HTTP server stays where it is started, and so do its limits; Ray Serve's own proxies are off. A request's way:
``backend`` -> ``scheduler_deployment`` -> ``replica_worker`` -> ``replica``. Ray is the optional extra ``ray``.
"""
