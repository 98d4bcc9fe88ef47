// Shows what a task emits, as it comes. A browser goes on by itself where a connection was cut off.
(() => {
  "use strict";
  const MOST = 200000, LATER = 5000;
  const part = () => document.querySelector("[data-stream]");
  let text = "", last = "", source;

  // A refresh of the page brings an empty part.
  const draw = () => {
    const at = part(), shown = at && at.querySelector("pre");
    if (!shown || shown.textContent === text) return;
    at.hidden = !text;
    shown.textContent = text;
  };
  const told = (value) => typeof value === "string" ? value : `${JSON.stringify(value)}\n`;
  const open = () => {
    if (!part()) return;
    const url = new URL(part().dataset.stream, location.href);
    if (last) url.searchParams.set("after", last);
    source = new EventSource(url);
    source.onmessage = (event) => {
      const chunk = JSON.parse(event.data);
      text = ((chunk.restart ? "" : text) + told(chunk.value)).slice(-MOST);
      last = event.lastEventId;
      draw();
    };
    source.addEventListener("end", () => source.close());
    source.onerror = () => {  // the browser gives up after a refusal
      if (source.readyState === EventSource.CLOSED) setTimeout(open, LATER);
    };
  };
  new MutationObserver(draw).observe(document.querySelector("main"), {childList: true, subtree: true, attributes: true});
  open();
})();
