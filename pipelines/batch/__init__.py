"""Many requests, one model: a manifest of rows in, videos and result rows out, and no row twice.

`manifest` reads the rows, `worker` runs them with a model that it loads once, `processes` and `ray` hand rows to
several workers, `groups` makes a worker of several processes that share each video, `journal` keeps what is done
through every kind of interruption, and `run` puts these together.
"""
