"""The reasons why a task waits, runs or has ended, in the language of a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from taskx.programs.dashboard.display import Display, short_id
from taskx.tasks.findings import Reason, first_line
from taskx.tasks.lifecycle import ANSWER, CHILDREN

_Facts = Mapping[str, Any]
_ID = re.compile(
    r"\b[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}(?:/[\w/-]+)?", re.ASCII
)
# The names that a sentence lists.
_LISTED = 3


def sentence(reason: Reason, show: Display) -> str:
    """Return a reason as one sentence. Its durations have the units that the rest of the page has."""
    if reason.kind in ("completed", "failed", "cancelled"):
        return _ended(reason.kind, reason.facts, show)
    if show.language == "zh":
        return _CHINESE[reason.kind](reason.facts, show)
    return reason.sentence


def linked(text: str, link: Callable[[str], str]) -> Markup:
    """Return a sentence as HTML, with short links in place of the ids that this program makes."""
    shown, place = Markup(), 0
    for found in _ID.finditer(text):
        shown += Markup('{}<a href="{}"><code>{}</code></a>').format(
            text[place : found.start()], link(found[0]), short_id(found[0])
        )
        place = found.end()
    return shown + text[place:]


def _ended(kind: str, facts: _Facts, show: Display) -> str:
    said = show.say(
        {"completed": "It completed", "failed": "It failed"}.get(kind, "It was cancelled")
    )
    if facts["at"] is not None:
        said += show.say(" at {time} UTC", time=show.clock(facts["at"], seconds=True))
    if facts["attempts"]:
        said += show.say(
            " after its executor ran for {time}, in attempt {number}",
            time=show.seconds(facts["duration"]),
            number=facts["attempts"],
        )
    if facts["worker"]:
        said += show.say(" on {worker}", worker=facts["worker"])
    return said + (f": {first_line(facts['error'])}" if facts["error"] else "")


# --- Chinese


def _names(names: Sequence[Any]) -> str:
    some = "、".join(map(str, [*names][:_LISTED]))
    return some if len(names) <= _LISTED else f"{some} 等 {len(names)} 个"


def _between(facts: _Facts, show: Display) -> str:
    since, until = facts.get("since"), facts.get("until")
    text = "" if since is None else f"，自 {show.clock(since)} 起"
    return text if until is None else f"{text}，至 {show.clock(until)} 止"


def _parents(facts: _Facts, show: Display) -> str:
    if not facts["unfinished"] and not facts["more"]:
        return "父任务都已结束：已启动的队列会立即让它继续。"
    least = "至少 " if facts["more"] else ""
    waits = [f"{id}（{show.say(status)}）" for id, status in facts["parents"].items()]
    return f"等待 {facts['of']} 个父任务中的{least} {facts['unfinished']} 个：{_names(waits)}。"


def _waiting(facts: _Facts, show: Display) -> str:
    between = _between(facts, show)
    if "unfinished" in facts:
        needed = "" if facts["needed"] is None else f"，完成 {facts['needed']} 个即可"
        left, of = facts["unfinished"], facts["of"]
        return f"等待 {of} 个子任务中的 {left} 个{needed}{between}，不占用线程。"
    if facts["status"] == "gone":
        return f"所等待的 {facts['id']} 已结束：已启动的队列会立即让它继续。"
    if facts["type"] == ANSWER:
        return f"等待人工答复 {facts['id']}{between}，不占用线程。"
    if facts["type"] == CHILDREN:
        return f"代表任务 {facts['id']} 的子任务，随其结束而结束。"
    status = facts["status"]
    return (
        f"等待任务 {facts['id']}（{facts['type']}，{show.say(status)}）结束{between}，不占用线程。"
    )


def _turn(facts: _Facts, show: Display) -> str:
    place = f"排在第 {facts['place']} 位" if facts["place"] else "前面还有很多任务"
    words = f"等待并发键 {facts['key']} 的轮次，{place}"
    if "holders" in facts:
        return f"{words}；当前由 {_names(facts['holders'])} 占用。"
    if facts["holder"] is None:
        return f"{words}；当前无任务占用，已启动的队列会立即让它继续。"
    status = facts["status"]
    words += f"；当前由任务 {facts['holder']}（{facts['type']}，{show.say(status)}）占用"
    if "waiting_on" in facts:
        words += f"，它正在等待 {facts['waiting_on']}"
    return f"{words}，睡眠至 {show.clock(facts['until'])}。" if "until" in facts else f"{words}。"


def _due(facts: _Facts, show: Display) -> str:
    at, left = show.clock(facts["run_at"]), show.seconds(facts["seconds"])
    if facts["seconds"] <= 0:
        return f"已于 {at} 到期：已启动的队列会立即让它继续。"
    if "until" in facts:
        step = f"在步骤 {facts['step']} 中" if facts["step"] else ""
        return f"{step}睡眠至 {at}，还需 {left}，不占用线程。"
    return f"第 {facts['attempt']} 次尝试将于 {at} 到期，还需 {left}。"


def _no_node(facts: _Facts, _: Display) -> str:
    words = f"没有在线节点可执行类型 {facts['type']}"
    if facts["stopping"]:
        words += f"；正在停止的节点：{_names(facts['stopping'])}"
    if facts["nodes"]:
        words += f"；执行其他类型的在线节点：{_names(facts['nodes'])}"
    if "silent" in facts:
        words += f"；可能已失联的节点：{_names(facts['silent'])}"
    return f"{words}。请启动可执行它的队列。"


def _limit(name: str) -> str:
    return f"类型 {name.removeprefix('type/')} " if name.startswith("type/") else f"限制 {name} "


def _hold(facts: _Facts, show: Display) -> str:
    who = f"任务 {facts['by']}" if facts["by"] else "人工"
    return f"{_limit(facts['limit'])}由{who}暂停至 {show.clock(facts['until'])}。"


def _slot(facts: _Facts, _: Display) -> str:
    holders = facts["holders"] or [*facts["nodes"]]
    most = facts["max_concurrency"]
    return f"{_limit(facts['limit'])}的 {most} 个并发名额已被占用：{_names(holders)}。"


def _token(facts: _Facts, show: Display) -> str:
    rate = f"速率为每 {show.seconds(facts['period'])} {facts['count']} 个"
    if facts["seconds"] is None:
        return f"可能在等待{_limit(facts['limit'])}的令牌（{rate}）：只有其节点知道下一个何时到来。"
    return (
        f"{_limit(facts['limit'])}的下一个令牌在 {show.seconds(facts['seconds'])}后到来（{rate}）。"
    )


def _worker(facts: _Facts, show: Display) -> str:
    nodes, running = _names(facts["nodes"]), facts["running"]
    words = f"可以启动，正在等待 {nodes} 的空闲工作线程，那里正运行 {running} 个任务"
    if facts.get("wait"):
        words += f"，或最多等待 {show.seconds(facts['wait'])}以合并更多任务"
    return f"{words}。"


def _running(facts: _Facts, show: Display) -> str:
    where = f"在 {facts['worker']} 上" if facts["worker"] else ""
    words = f"已{where}运行 {show.seconds(facts['seconds'])}，第 {facts['attempt']} 次尝试"
    if facts["state"] in ("starting", "ahead"):
        words = f"已于 {show.seconds(facts['seconds'])}前启动，正在等待本进程的线程"
    return f"{words}；{facts['progress']} %。" if facts["progress"] else f"{words}。"


_CHINESE: Mapping[str, Callable[[_Facts, Display], str]] = {
    "expired": lambda f, d: f"到 {d.clock(f['expires_at'])} 仍未开始：已启动的队列会取消它。",
    "stuck": lambda f, _: (
        f"早先一次尝试的线程卡在节点 {f['name']} 上：在该线程或其进程结束之前，任务不能再次启动。"
    ),
    "parents": _parents,
    "waiting": _waiting,
    "turn": _turn,
    "due": _due,
    "no_node": _no_node,
    "paused": lambda f, _: (
        "所有类型均已暂停，等待恢复。"
        if f["type"] is None
        else f"类型 {f['type']} 已暂停，等待恢复。"
    ),
    "hold": _hold,
    "slot": _slot,
    "token": _token,
    "suspect": lambda f, _: f"等待 {_names(f['others'])}：再次崩溃即失败的任务须单独运行。",
    "broker": lambda f, _: f"节点 {_names(f['nodes'])} 无法使用消息代理：{f['error']}。",
    "ahead": lambda f, _: (
        f"前面还有{'超过' if f['more'] else ''} {f['ahead']} 个任务，其中 {f['higher']} 个优先级更高。"
    ),
    "worker": _worker,
    "dead_node": lambda f, _: f"节点 {f['name']} 已失联：在线节点会收回该任务。",
    "silent_node": lambda f, d: (
        f"节点 {f['name']} 可能已失联，最近心跳在 {d.clock(f['at'])}：若确实如此，在线节点会收回该任务。"
    ),
    "cancel_requested": lambda f, d: f"已于 {d.clock(f['at'])} 请求停止，执行器尚未结束。",
    "timeout": lambda f, d: f"其超时 {d.seconds(f['timeout'])}已过去 {d.seconds(f['seconds'])}。",
    "running": _running,
    "damaged": lambda f, _: f"存储的记录已损坏：{f['damage']}。",
    "repository": lambda f, _: f"无法读取存储：{f['error']}。",
}
