"""The WSGI application. The queue is started here, so it runs only in processes that serve requests.

``manage.py runserver``
    It imports this module in the process that serves, not in the reloader's parent.

``gunicorn -w 2 project.wsgi``
    Every worker process imports this module and has its own queue. The queues share the tasks.

``gunicorn --preload``
    The master imports this module, but a fork does not copy threads. Remove ``start()`` here, and put
    this into ``gunicorn.conf.py``::

        def post_worker_init(worker):
            from reports.tasks import queue

            queue.start()

Commands such as ``manage.py migrate`` do not import this module. You need not stop the queue: it is stopped
when the process ends, and its running tasks are handed back.
"""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
application = get_wsgi_application()

from reports.tasks import queue  # noqa: E402  (the app's models can be imported only from here on)

queue.start()
