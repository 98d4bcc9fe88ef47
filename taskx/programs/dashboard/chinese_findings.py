"""The Chinese forms of what is wrong, of how a task has ended, and of the fields of a filter."""

from __future__ import annotations

from collections.abc import Mapping

FINDINGS: Mapping[str, str] = {
    "Release": "解除",
    "Show the tasks": "查看任务",
    "Cancel them": "全部取消",
    "Show the limits": "查看限制",
    "Show the schedules": "查看定时计划",
    "No node runs {type}: {count} task waits. Start a worker that has it, or cancel it.|"
    "No node runs {type}: {count} tasks wait. Start a worker that has it, or cancel them.": (
        "没有节点执行 {type}：{count} 个任务在等待。请启动可执行它的节点，或取消这些任务。"
    ),
    "No worker runs: {count} task waits. Start one: taskx worker module:queue.|No worker "
    "runs: {count} tasks wait. Start one: taskx worker module:queue.": (
        "没有运行中的节点：{count} 个任务在等待。请启动一个：taskx worker module:queue。"
    ),
    "Only {nodes} of {least} workers run {type}. Start another one.": (
        "执行 {type} 的节点只有 {nodes} 个，少于 {least} 个。请再启动一个。"
    ),
    "Only {nodes} of {least} workers run. Start another one.": (
        "运行中的节点只有 {nodes} 个，少于 {least} 个。请再启动一个。"
    ),
    "Limit {limit} is held for another {time}, until {until} UTC: nothing starts under "
    "it. Release it when it may go on.": (
        "限制 {limit} 还将暂停 {time}，至 UTC {until}：期间不启动任务。可以继续时请解除。"
    ),
    "{type} names the limit {limit}, which no program declares: nothing limits it. "
    "Declare it with queue.limit().": (
        "{type} 使用的限制 {limit} 没有程序声明，因此不受限制。请用 queue.limit() 声明它。"
    ),
    "Programs declare limit {limit} with different values: that of the last one holds. "
    "Deploy one value.": "各程序对限制 {limit} 的声明不一致，以最后启动者为准。请统一声明。",
    "{count} thread on {name} runs on after its time-out. Look at it, then restart the node.|"
    "{count} threads on {name} run on after their time-out. Look at them, then restart the node.": (
        "{name} 上有 {count} 个线程超时后仍在运行。请查看线程，然后重启节点。"
    ),
    "{type} stands still: {count} task waits for stuck threads on {nodes}. Restart the "
    "node.|{type} stands still: {count} tasks wait for stuck threads on {nodes}. Restart "
    "the node.": "{type} 已停滞：{count} 个任务在等待 {nodes} 上卡住的线程。请重启节点。",
    "A coroutine on {name} has blocked the event loop for {time}: no other one goes on. "
    "See what it does.": (
        "{name} 上的一个协程已阻塞事件循环 {time}，其他协程无法继续。请查看线程。"
    ),
    "{count} node may be dead: its last heartbeat is {time} old. If it lives, set its "
    "clock.|{count} nodes may be dead: the last heartbeat of one is {time} old. If they "
    "live, set their clocks.": (
        "{count} 个节点可能已失联：最近心跳在 {time}前。若仍在运行，请校准时钟。"
    ),
    "{name} cannot use its broker: {error}. Look at the broker.": (
        "{name} 无法使用消息代理：{error}。请检查消息代理。"
    ),
    "A task of {type} has asked {snoozes} times to run later. Set max_snoozes, or cancel it.": (
        "{type} 的一个任务已推迟 {snoozes} 次。请设置 max_snoozes，或取消它。"
    ),
    "A task has waited for {time} since it was due. See what it waits for.": (
        "有任务到期后已等待 {time}。请查看它在等什么。"
    ),
    "{failed} tasks failed within {time}, more than {most}. Look at their errors.": (
        "{time} 内有 {failed} 个任务失败，超过 {most} 个。请查看错误。"
    ),
    "{type} fails: {failed} of {number} tasks of the last hour. Look at their errors.": (
        "{type} 频繁失败：最近一小时 {number} 个任务中有 {failed} 个失败。请查看错误。"
    ),
    "The disk is nearly full: soon no task can be stored. Free some space.": (
        "磁盘即将写满：很快将无法存储任务。请释放空间。"
    ),
    "The file has {size}, more than {most}. Delete old tasks.": (
        "文件大小为 {size}，超过 {most}。请删除旧任务。"
    ),
    "A schedule is overdue for {time}: {names}. Start a worker, or run it now.|{count} "
    "schedules are overdue, one for {time}: {names}. Start a worker, or run them now.": (
        "{count} 个定时计划逾期，最久 {time}：{names}。请启动节点，或立即运行。"
    ),
    "A transaction in the database has been open for {time}: it keeps removed rows, and tasks are "
    "found ever more slowly. End it.": (
        "数据库中有一个事务已打开 {time}：已删除的行无法清理，查找任务越来越慢。请结束它。"
    ),
    "These schedules cannot be read: {names}. Store them again.": (
        "无法读取这些定时计划：{names}。请重新存储。"
    ),
    "Everything is paused: {count} task waits. Resume it when it may go on.|Everything "
    "is paused: {count} tasks wait. Resume it when they may go on.": (
        "全部已暂停：{count} 个任务在等待。可以继续时请恢复。"
    ),
    "{type} is paused: {count} task waits. Resume it when it may go on.|{type} is "
    "paused: {count} tasks wait. Resume it when they may go on.": (
        "{type} 已暂停：{count} 个任务在等待。可以继续时请恢复。"
    ),
    "The repository cannot be used: {error}. Look at its disk or its server.": (
        "无法使用存储：{error}。请检查其磁盘或服务器。"
    ),
    "It was cancelled": "已取消",
    "It completed": "已完成",
    "It failed": "已失败",
    " at {time} UTC": "，UTC {time}",
    " after its executor ran for {time}, in attempt {number}": (
        "，执行器运行了 {time}，第 {number} 次尝试"
    ),
    " on {worker}": "，在 {worker} 上",
    "tasks of this type": "此类型的任务",
    "one of pending, running, completed, failed, cancelled": (
        "状态：pending、running、completed、failed、cancelled 之一"
    ),
    "tasks with this tag; give it again for tasks with both tags": (
        "带此标签的任务；可重复以同时要求多个标签"
    ),
    "tasks with this created_by": "created_by 为此值的任务",
    "tasks whose error contains this text": "错误中含此文本的任务",
    "tasks whose last attempt raised this class, such as ValueError": (
        "最后一次尝试抛出此类异常的任务，例如 ValueError"
    ),
    "tasks whose id begins with this text": "编号以此文本开头的任务",
    "tasks with this value in their params, such as params.user.id:7": (
        "参数中有此值的任务，例如 params.user.id:7"
    ),
    "tasks that depend on the task with this id": "依赖此编号任务的任务",
    "tasks of the flow with this id": "此编号流程的任务",
    "tasks submitted longer ago than this, such as 90s, 15m, 2h, 1d or 1w": (
        "提交时间早于此时长之前的任务，例如 90s、15m、2h、1d 或 1w"
    ),
    "tasks submitted within this time": "在此时长之内提交的任务",
    "tasks submitted at or after this time, such as 2026-11-26T10:00Z": (
        "在此时间或之后提交的任务，例如 2026-11-26T10:00Z"
    ),
    "tasks submitted before or at this time": "在此时间或之前提交的任务",
}
