"""What a server serves, and the place where the queue starts: where requests are served, and only there.

``manage.py runserver``
    It imports this module in the process that serves, not in the reloader's parent.

``gunicorn -w 2 project.wsgi``
    Every worker process imports it and has a queue of its own; they share the tasks.

``gunicorn --preload``
    The master imports it, and a fork copies no threads. Take ``start()`` out of here and put this in
    ``gunicorn.conf.py``::

        def post_worker_init(worker):
            from reports.tasks import queue

            queue.start()

Commands such as ``manage.py migrate`` never come here. Nobody needs to stop the queue: when the process
ends it is stopped, and what it was running is handed back.
"""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
application = get_wsgi_application()

from reports.tasks import queue  # noqa: E402  (the app's models are there from here on)

queue.start()
