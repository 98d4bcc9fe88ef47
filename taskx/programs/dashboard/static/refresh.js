// Refreshes the main part of the page, which htmx merges into the present one.
// A request carries the ETag of the last answer: nothing happens while the page has not changed.
(() => {
  "use strict";
  const PERIOD = 2000, LONGEST = 30000;
  const etags = new Map();
  let wait = PERIOD, timer;

  const main = () => document.querySelector("#main[hx-get]");
  // True if a field has not the value that the server has sent. A search that was cleared has nothing to lose.
  const changed = (field) => {
    if (field.type === "checkbox") return field.checked !== field.defaultChecked;
    if (field.type === "search" && !field.value) return false;
    if (!field.options) return field.value !== field.defaultValue;
    return field.selectedIndex !== Math.max(0, [...field.options].findIndex((one) => one.defaultSelected));
  };
  // A search stays as it is when the rest is merged. A click leaves the focus on a box.
  const entered = (field) => field.matches(":focus:not([type=search], [type=checkbox]), [type=checkbox]:focus-visible");
  const busy = () => {
    const part = main();
    if (!part || document.hidden || document.querySelector("dialog[open]")) return true;
    const fields = [...part.querySelectorAll("input, select, textarea")];
    return fields.some((field) => changed(field) || entered(field)) || !getSelection().isCollapsed;
  };
  const next = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (!busy()) htmx.trigger(main(), "refresh");
      next();
    }, wait);
  };
  // What the user has opened or closed stays so.
  const opened = new Map();
  document.addEventListener("toggle", (event) => {
    if (event.target.id && event.target.matches("details")) opened.set(event.target.id, event.target.open);
  }, true);
  document.addEventListener("htmx:after:swap", () => {
    for (const [id, open] of opened) {
      const part = document.getElementById(id);
      if (part) part.open = open;
    }
  });
  const tell = (working) => document.body.toggleAttribute("data-away", !working);

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return clearTimeout(timer);
    if (!busy()) htmx.trigger(main(), "refresh");
    next();
  });
  document.addEventListener("htmx:config:request", (event) => {
    const request = event.detail.ctx.request, etag = etags.get(request.action);
    if (etag) request.headers["If-None-Match"] = etag;
  });
  document.addEventListener("htmx:after:request", (event) => {
    const {request, response} = event.detail.ctx;
    const working = Boolean(response) && response.status < 500;
    wait = working ? PERIOD : Math.min(2 * wait, LONGEST);
    tell(working);
    if (busy()) return event.preventDefault();  // begun since the request: the answer is not merged
    const etag = response && response.headers.get("ETag");
    if (etag) etags.set(request.action, etag);
  });
  document.addEventListener("htmx:error", () => {
    wait = Math.min(2 * wait, LONGEST);
    tell(false);
  });
  next();
})();
