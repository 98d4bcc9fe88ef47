"""An agent that reviews documents of three tenants. Kill it at any moment, and run it again: it goes on.

pip install 'taskx-queue[cli]' httpx
python agent_api.py            # in another terminal: stands for the model, the tools and the mail server
python agent.py
taskx --repository sqlite:///agent.db answers      # then: finish ID/approval '"yes"', or tail ID
"""

import os

import httpx

from taskx import Config, Context, Queue, RetryPolicy, Snooze, SQLiteRepository, retry_after

DOCUMENTS = [(tenant, name) for tenant in ("acme", "bolt", "cord") for name in ("lease", "offer")]
queue = Queue(SQLiteRepository("agent.db"), Config(worker_num=50))
queue.limit("model", concurrency=8, rate=["600/m", "9000 tokens/m"])  # of all tenants together
queue.limit("tenant:", share=True)  # no tenant waits for all documents of another one
url = os.environ.get("AGENT_URL", "http://127.0.0.1:8765")
client = httpx.AsyncClient(base_url=url, timeout=None)  # the time-out of the task is enough


@queue.executor(limit="model", timeout="5m", retry=RetryPolicy(5))
async def think(ctx: Context, prompt: str) -> str:
    """Ask the model, and show its answer word by word."""
    async with client.stream("POST", "/think", content=prompt) as answer:
        if answer.status_code == 429:
            raise Snooze(retry_after(answer), limit=True)  # nobody asks until then
        words = []
        async for word in answer.raise_for_status().aiter_lines():
            ctx.emit(word)
            words.append(word)
    ctx.spent(tokens=len(words))
    return " ".join(words)


@queue.executor(timeout="5m", retry=RetryPolicy(5))
async def ask(method: str, path: str, text: str = "") -> str:
    """Use a tool, or send a mail."""
    return (await client.request(method, path, content=text)).raise_for_status().text


@queue.executor(retry=RetryPolicy(5))
async def review(ctx: Context, tenant: str, document: str) -> str:
    """Review a document. After each wait it is called anew; what is done is not done again."""
    model = think.using(key=f"tenant:{tenant}", cost={"tokens": 40})
    [topics] = ctx.run_all("topics", [model.task(f"topics of {tenant}'s {document}")])
    facts = ctx.run_all("tools", [ask.task("GET", f"/tools/{topic}") for topic in topics.split()])
    [letter] = ctx.run_all("letter", [model.task(f"letter about {tenant}'s {document}: {facts}")])
    if ctx.ask("approval", letter, timeout="30d") != "yes":
        return "refused"
    await ctx.astep("send", ask, "POST", f"/mails/{ctx.key('send')}", letter)
    ctx.sleep(os.environ.get("AGENT_DAYS", "3d"), step="time to answer")
    await ctx.astep("remind", ask, "POST", f"/mails/{ctx.key('remind')}", f"Again: {letter}")
    return letter


if __name__ == "__main__":
    with queue:
        print(*queue.map(review, DOCUMENTS, star=True), sep="\n")
