// Before anything is painted: the colours that were chosen, or the system's. No module, so that it
// blocks.
"use strict";

const THEMES = ["system", "light", "dark"];
const MARKS = { system: "◐", light: "☀", dark: "☾" };

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
  const button = document.getElementById("theme");
  if (!button) return;
  button.textContent = MARKS[name];
  button.setAttribute("aria-label", `Colours: ${name}`);
  button.title = `Colours: ${name}`;
}

const stored = localStorage.getItem("theme");
setTheme(THEMES.includes(stored) ? stored : "system");

document.addEventListener("DOMContentLoaded", () => {
  setTheme(document.documentElement.dataset.theme);
  document.getElementById("theme").addEventListener("click", () => {
    const now = THEMES.indexOf(document.documentElement.dataset.theme);
    setTheme(THEMES[(now + 1) % THEMES.length]);
  });
});
