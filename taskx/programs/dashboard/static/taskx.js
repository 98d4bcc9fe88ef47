// The keyboard, "select all", and what a screen reader hears of changes.
// Every page works without it.
(() => {
  "use strict";
  const find = (selector) => document.querySelector(selector);
  const typing = (at) => at.closest("input, textarea, select, [contenteditable]") !== null;

  // --- the keyboard: / to search, ? for help, g and a letter to go to a screen
  let went = false;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (typing(event.target) || find("dialog[open]")) return;
    const follows = went;
    went = event.key === "g" && !follows;
    if (follows) {
      const link = find(`nav a[data-go="${CSS.escape(event.key)}"]`);
      if (link) { event.preventDefault(); link.click(); }
    } else if (event.key === "/") {
      const field = find("[data-search]");
      event.preventDefault();
      if (field) { field.focus(); field.select(); } else find('nav a[data-go="t"]').click();
    } else if (event.key === "?") {
      const help = find("#keys");
      if (help) { event.preventDefault(); help.showModal(); }
    } else if (event.key === "j" || event.key === "k") {
      const links = [...document.querySelectorAll("main tbody tr a.item")];
      const at = links.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1);
      if (links.length) { event.preventDefault(); links[Math.max(0, Math.min(at, links.length - 1))].focus(); }
    }
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest("#help")) find("#keys").showModal();
    if (event.target.closest("[data-close]")) event.target.closest("dialog").close();
    const copied = event.target.closest("[data-copy]");
    if (copied && navigator.clipboard) navigator.clipboard.writeText(copied.dataset.copy);
  });

  // --- one box that ticks all the boxes of its form
  document.addEventListener("change", (event) => {
    const all = event.target, form = all.form;
    if (!form || all.type !== "checkbox") return;
    const boxes = [...form.elements].filter((box) => box.type === "checkbox" && box.name === "id");
    if ("all" in all.dataset) for (const box of boxes) box.checked = all.checked;
    const ticked = boxes.filter((box) => box.checked).length, whole = form.querySelector("[data-all]");
    if (whole) { whole.checked = ticked === boxes.length; whole.indeterminate = ticked > 0 && !whole.checked; }
  });

  // --- a question before a change of a single task; the server asks if no script does
  document.addEventListener("submit", (event) => {
    const asks = event.submitter && event.submitter.dataset.ask;
    if (!asks) return;
    if (!confirm(asks)) return event.preventDefault();
    event.submitter.name = "confirmed";  // so that the server does not ask again
    event.submitter.value = "1";
  });

  // --- changes: the texts of [data-announce] are said politely when a refresh has changed them
  const said = () => [...document.querySelectorAll("[data-announce]")].map((at) => at.textContent.trim().replace(/\s+/g, " ")).join(" ");
  let before = "";
  document.addEventListener("DOMContentLoaded", () => {
    before = said();
    for (const button of document.querySelectorAll("#help, [data-copy]")) button.hidden = !button.id && !navigator.clipboard;
  });
  document.addEventListener("merged", () => {
    const now = said();
    if (now !== before) find("#live").textContent = before = now;
  });
})();
