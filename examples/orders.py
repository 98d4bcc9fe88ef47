"""A shop that stores each order together with the task that writes its mail.

    python examples/orders.py

An order and its task are stored in one transaction, and so are a mail and the completion of the task that
wrote it. So each order has exactly one mail, whenever the program dies.
"""

import sqlite3
from contextlib import closing

from taskx import Config, Context, Queue, SQLiteRepository

FILE = "shop.db"


def connect() -> sqlite3.Connection:
    return sqlite3.connect(FILE, timeout=10)


def create_tables() -> None:
    with closing(connect()) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # TaskX requires it and does not change it
        connection.execute(
            "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, book TEXT, customer TEXT)"
        )
        connection.execute("CREATE TABLE IF NOT EXISTS mails (id INTEGER PRIMARY KEY, text TEXT)")


queue = Queue(SQLiteRepository(FILE, prefix="taskx_"), Config(worker_num=4))


@queue.executor("confirm", max_attempts=5)
def confirm(ctx: Context, order: int) -> None:
    with ctx.transaction() as tx:
        book, customer = tx.connection.execute(
            "SELECT book, customer FROM orders WHERE id = ?", (order,)
        ).fetchone()
        text = f"to {customer}: thank you for ordering {book}"
        tx.connection.execute("INSERT INTO mails (text) VALUES (?)", (text,))
        tx.complete()


def buy(book: str, customer: str, price: float, credit: float) -> bool:
    """Store an order and its task. Return False if the customer cannot pay, and neither is stored."""
    with closing(connect()) as connection:
        row = connection.execute(
            "INSERT INTO orders (book, customer) VALUES (?, ?)", (book, customer)
        ).lastrowid
        queue.submit("confirm", {"order": row}, connection=connection)
        if price > credit:
            connection.rollback()
            return False
        connection.commit()
        return True


if __name__ == "__main__":
    create_tables()
    with queue:
        for customer, credit in (("Ann", 30.0), ("Bob", 5.0), ("Cid", 12.5)):
            bought = buy("Emma", customer, 12.5, credit)
            print(f"{customer} {'bought it' if bought else 'cannot pay'}")
        queue.drain(timeout=60)
    with closing(connect()) as connection:
        ((orders,),) = connection.execute("SELECT count(*) FROM orders")
        mails = [text for (text,) in connection.execute("SELECT text FROM mails")]
    print(*mails, f"{orders} orders, {len(mails)} mails", sep="\n")
