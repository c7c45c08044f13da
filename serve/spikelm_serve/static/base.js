// What all parts of the page use: elements, numbers as text, and the browser's memory.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const count = (number) => number.toLocaleString("en");
export const tokens = (number) => `${count(number)} ${number === 1 ? "token" : "tokens"}`;
export const percent = (share) => `${(share * 100).toFixed(1)} %`;

// Browsers can forbid storage, and it can be full; the page then works without a memory.
export function recall(area, name) {
  try {
    return window[area].getItem(`spikelm.${name}`);
  } catch {
    return null;
  }
}

// What was stored as JSON; null where something else wrote it.
export function recallJson(area, name) {
  try {
    return JSON.parse(recall(area, name));
  } catch {
    return null;
  }
}

// Whether it was stored. Null is forgotten.
export function remember(area, name, value) {
  try {
    if (value === null) window[area].removeItem(`spikelm.${name}`);
    else window[area].setItem(`spikelm.${name}`, value);
    return true;
  } catch {
    return false;
  }
}
