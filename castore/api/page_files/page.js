// Keeps the status page up to date: fetches it again and replaces the sections that changed. Without it the page is whole.
"use strict";

const EVERY_MS = 5000; // as often as backends are probed
const PATIENCE_MS = 15000; // a page takes a second or two

const live = document.getElementById("live");
const button = document.createElement("button");
button.type = "button";
live.after(button);
let paused = false;
let timer = 0;

function say(text) {
  // Only what is new: a screen reader says each change.
  if (live.textContent !== text) live.textContent = text;
}

function replaceChanged(fresh) {
  document.title = fresh.title;
  document.getElementById("made").replaceWith(fresh.getElementById("made"));
  for (const section of fresh.querySelectorAll("main > section")) {
    const old = document.getElementById(section.id);
    const isRead = old.contains(document.activeElement) || holdsSelection(old);
    if (!isRead && old.outerHTML !== section.outerHTML) old.replaceWith(section);
  }
}

function holdsSelection(element) {
  const selection = document.getSelection();
  return !selection.isCollapsed && selection.containsNode(element, true);
}

async function update() {
  clearTimeout(timer);
  try {
    const answer = await fetch("/", { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`the answer is ${answer.status}`);
    replaceChanged(new DOMParser().parseFromString(await answer.text(), "text/html"));
    document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates || 0) + 1;
    say("");
  } catch (error) {
    say(" · no answer since: trying again");
  }
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (!paused && !document.hidden) timer = setTimeout(update, EVERY_MS);
}

function show() {
  button.textContent = paused ? "Go on updating" : "Pause updates";
}

button.addEventListener("click", () => {
  paused = !paused;
  show();
  if (paused) schedule();
  else update();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused) update();
});
show();
schedule();
