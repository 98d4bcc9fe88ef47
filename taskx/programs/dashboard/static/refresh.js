// Keeps the page fresh: asks for it every two seconds, merges what is new, and says at the top if it does.
// A request carries the ETag of the last answer: nothing is sent while the page has not changed.
(() => {
  "use strict";
  const PERIOD = 2000, LONGEST = 30000, IDLE = 30000;
  let wait = PERIOD, timer, etag = "", touched = 0, away = false;

  const main = () => document.querySelector("#main[data-url]");
  // True if a field has not the value that the server has sent. A search that was cleared has nothing to lose.
  const changed = (field) => {
    if (field.type === "checkbox") return field.checked !== field.defaultChecked;
    if (field.type === "search" && !field.value) return false;
    if (!field.options) return field.value !== field.defaultValue;
    return field.selectedIndex !== Math.max(0, [...field.options].findIndex((one) => one.defaultSelected));
  };
  // A search stays as it is when the rest is merged. A click leaves the focus on a box.
  const entered = (field) => field.matches(":focus:not([type=search], [type=checkbox]), [type=checkbox]:focus-visible");
  // The name of what would be lost by a refresh; empty if nothing would. Whoever only looks goes on after a while.
  const begun = () => {
    if (document.querySelector("dialog[open]")) return "help";
    const fields = [...main().querySelectorAll("input, select, textarea")];
    const lost = fields.find(changed);
    if (lost) return lost.type === "checkbox" ? "tick" : "entry";
    if (Date.now() - touched > IDLE) return "";
    return fields.some(entered) ? "entry" : getSelection().isCollapsed ? "" : "text";
  };
  const show = () => {
    const button = document.querySelector("#state"), why = main() ? begun() : "";
    button.hidden = !main();
    button.className = away ? "bad" : why ? "warn" : "ok";
    const {live, paused, lost} = button.dataset;
    button.textContent = away ? lost : why ? `${paused} ${button.dataset[why]}` : live;
    return why;
  };

  const alike = (old, part) => old.nodeName === part.nodeName && (old.id || "") === (part.id || "");
  // Makes a node like another one. Parts stay what they are, with their focus, and boxes stay as the user has set them.
  const merge = (old, part) => {
    for (const {name} of [...old.attributes]) if (name !== "open" && !part.hasAttribute(name)) old.removeAttribute(name);
    for (const {name, value} of part.attributes) if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
    let at = old.firstChild;
    for (const fresh of [...part.childNodes]) {
      let same = at;
      while (same && !alike(same, fresh)) same = same.nextSibling;
      if (same && same === at) at = at.nextSibling;
      else old.insertBefore(same || fresh, at);
      if (same && same.nodeType === 1) merge(same, fresh);
      else if (same && same.data !== fresh.data) same.data = fresh.data;
    }
    while (at) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
  };

  const ask = async () => {
    const {url} = main().dataset, headers = {"Taskx-Refresh": "1"}, stop = new AbortController();
    const late = setTimeout(() => stop.abort(), LONGEST);  // a server that never answers is away, too
    if (etag) headers["If-None-Match"] = etag;
    try {
      const answer = await fetch(url, {headers, cache: "no-store", signal: stop.signal});
      const text = await answer.text(), fresh = new DOMParser().parseFromString(text, "text/html").querySelector("#main");
      if (answer.status >= 500 || answer.status === 429) throw answer;
      if (answer.status !== 304 && !fresh || answer.status === 401) return location.reload();  // to the login
      away = false;
      wait = PERIOD;
      // What was begun since the request is not lost.
      if (!fresh || answer.status === 304 || !main() || main().dataset.url !== url || begun()) return;
      etag = answer.headers.get("ETag") || "";
      merge(main(), fresh);
      document.dispatchEvent(new Event("merged"));
    } catch {
      away = true;
      wait = Math.min(2 * wait, LONGEST);
    } finally {
      clearTimeout(late);
    }
  };
  const next = () => {
    clearTimeout(timer);
    if (main() && !document.hidden) timer = setTimeout(go, wait);
    show();
  };
  const go = async () => {
    clearTimeout(timer);
    if (!show()) await ask();
    next();
  };

  for (const name of ["keydown", "pointerdown", "input", "change", "selectionchange"]) {
    document.addEventListener(name, () => { touched = Date.now(); setTimeout(show); });
  }
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : main() && go()));
  // The button takes back what was begun.
  document.querySelector("#state").addEventListener("click", () => {
    for (const form of main().querySelectorAll("form")) form.reset();
    document.activeElement.blur();
    getSelection().removeAllRanges();
    go();
  });
  next();
})();
