"""Workers on a Ray cluster: one deployment for the scheduler, and one for each replica of the model.

The HTTP server and its limits stay in the process that starts it; Ray Serve's own proxies are off. Path of a request:
``backend`` -> ``scheduler_deployment`` -> ``replica_worker`` -> ``replica``. Ray is the optional extra ``ray``.
"""
