// Elements without markup: no text ever becomes HTML.

/**
 * An element: make("p", {class: "note", onclick: f}, "text", child).
 *
 * @param {string} tag
 * @param {object} properties  attributes; those that begin with "on" are listeners
 * @param {...(Node|string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** The file as it can be seen or heard; its memory is let go with `release`. */
export function preview(file, kind, { still = false } = {}) {
  const url = URL.createObjectURL(file);
  if (kind === "image") return make("img", { src: url, alt: file.name });
  return make(kind, { src: url, controls: !still || kind === "audio", "aria-label": file.name });
}

/** Let go of the previews in an element that is about to leave. */
export function release(element) {
  for (const medium of element.querySelectorAll("img, video, audio")) {
    if (medium.src.startsWith("blob:")) URL.revokeObjectURL(medium.src);
  }
}
