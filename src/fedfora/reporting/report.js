// Keeps a watched page up to date: asks for it again and puts in what has changed, so that what is
// open stays open, what is chosen stays chosen, and the reader's place and focus stay.
"use strict";
const SECONDS = 2;

function parts(page) {
  return [...page.querySelectorAll("#live, #index, #compared, section.run > [id]")];
}

function keep(old, fresh) {
  const pairs = (selector) => {
    const after = [...fresh.querySelectorAll(selector)];
    return [...old.querySelectorAll(selector)].map((before, i) => [before, after[i]]).filter(([, b]) => b);
  };
  for (const [before, after] of pairs("details")) after.open = before.open;
  for (const [before, after] of pairs("input")) after.checked = before.checked;
  for (const [before, after] of pairs("select")) {
    const same = [...after.options].findIndex((option) => option.text === before.value);
    after.selectedIndex = Math.max(0, same);
  }
  const scrolls = pairs(".scroll, .examples").map(([before, after]) => [after, before.scrollLeft, before.scrollTop]);
  const can = "a, button, select, summary, input, [tabindex]";
  const focused = pairs(can).find(([before]) => before === document.activeElement);
  old.replaceWith(fresh);
  addButtons(fresh);
  for (const [element, left, top] of scrolls) element.scrollTo(left, top);
  if (focused) focused[1].focus({ preventScroll: true });
}

async function look() {
  try {
    const answer = await fetch(location.href, { headers: tag ? { "If-None-Match": tag } : {} });
    document.body.classList.toggle("stale", answer.status !== 200 && answer.status !== 304);
    if (answer.status === 200) {
      tag = answer.headers.get("ETag");
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const sent = new Map(parts(page).map((part) => [part.id, part.outerHTML]));
      if ([...known.keys()].join() !== [...sent.keys()].join()) return location.reload();
      for (const part of parts(page)) {
        const old = document.getElementById(part.id);
        if (old && known.get(part.id) !== sent.get(part.id)) keep(old, part);
      }
      known = sent;
    }
  } catch {
    document.body.classList.add("stale");
  }
  setTimeout(look, SECONDS * 1000);
}

function addButtons(place) {
  for (const code of place.querySelectorAll(".commands code")) {
    const copy = document.createElement("button");
    copy.textContent = "copy";
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "copied";
      } catch { // over plain http from elsewhere, or not allowed
        copy.textContent = "not allowed here: mark it and copy";
      }
    });
    code.after(" ", copy);
  }
}

let tag = null;
let known = new Map(parts(document).map((part) => [part.id, part.outerHTML])); // as it was sent
addButtons(document);
setTimeout(look, SECONDS * 1000);
