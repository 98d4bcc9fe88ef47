"""The Chinese forms of the dashboard's texts. The parts in braces are values and keep their names."""

from __future__ import annotations

from collections.abc import Mapping

CHINESE: Mapping[str, str] = {
    # statuses
    "completed": "已完成",
    "running": "运行中",
    "pending": "待执行",
    "failed": "失败",
    "cancelled": "已取消",
    # times and schedules
    "{number} d": "{number} 天",
    "{number} h": "{number} 小时",
    "{number} min": "{number} 分钟",
    "{number} s": "{number} 秒",
    "{number} ms": "{number} 毫秒",
    "{time} ago": "{time}前",
    "in {time}": "{time}后",
    "every {time}": "每 {time}",
    "every minute": "每分钟",
    "every {count} minutes": "每 {count} 分钟",
    "every {count} hours, at minute {minute}": "每 {count} 小时，第 {minute} 分",
    "hourly, at minute {minute}": "每小时第 {minute} 分",
    "at {times}": "{times}",
    "daily, {when}": "每天 {when}",
    "{days}, {when}": "{days} {when}",
    "monthly on day {day}, {when}": "每月 {day} 日 {when}",
    "Monday to Friday": "周一至周五",
    "Monday": "周一",
    "Tuesday": "周二",
    "Wednesday": "周三",
    "Thursday": "周四",
    "Friday": "周五",
    "Saturday": "周六",
    "Sunday": "周日",
    # charts
    "{completed} completed, {failed} failed": "完成 {completed} 个，失败 {failed} 个",
    "Tasks that were submitted before {time} are not counted.": "{time} 之前提交的任务未计入。",
    "time (UTC)": "时间（UTC）",
    "intervals of {time}": "每格 {time}",
    "now": "现在",
    "No run times yet.": "尚无运行时间。",
    "run time": "运行时间",
    "tasks": "任务数",
    "{count} task|{count} tasks": "{count} 个任务",
    "{title}: {count} in all, at most {most} at a time": "{title}：共 {count}，单格最多 {most}",
    "as a table": "以表格显示",
    "{count} task further down is not shown.|{count} tasks further down are not shown.": (
        "下方还有 {count} 个任务未显示。"
    ),
    # the frame of a page
    "Skip to the content": "跳到正文",
    "Screens": "页面",
    "The dashboard does not answer. It is asked again.": "控制台没有响应，正在重试。",
    "Overview": "概览",
    "Error {status}": "错误 {status}",
    "Not found": "未找到",
    "Not allowed": "无权限",
    "The repository is away": "无法访问存储",
    "This did not work": "操作未成功",
    "What is wrong": "当前问题",
    "This needs the permission “{permission}”.": "需要权限“{permission}”。",
    "All is well.": "一切正常。",
}
