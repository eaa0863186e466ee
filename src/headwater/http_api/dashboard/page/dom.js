// Elements without markup in strings: what the server sends is text, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

/** Set a text only if it changed, so that a reader's selection and a screen reader's place stay. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Keep the children of `parent` in step with `items` ([key, item] pairs): elements are made once, updated, and removed.
 * An element that has the focus keeps it.
 */
export function keepList(parent, items, make, update) {
  const known = parent.known ?? (parent.known = new Map());
  const wanted = new Set(items.map(([key]) => key));
  for (const [key, element] of known) {
    if (!wanted.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
  let next = parent.firstElementChild;
  for (const [key, item] of items) {
    let element = known.get(key);
    if (!element) {
      element = make(item, key);
      known.set(key, element);
    }
    update(element, item, key);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
}

/** Do `work` once at a time. The button is not disabled meanwhile: that would take the focus from it. */
export async function whileBusy(button, work) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  try {
    await work();
  } finally {
    button.ariaDisabled = null;
  }
}
