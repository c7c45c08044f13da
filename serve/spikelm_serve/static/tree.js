// The tree of turns, and what the browser keeps of it.
//
// It is kept per model, and only in this browser. Turns that have their answer never change (but
// for their names), so tabs with the same tree can add to each other's.

import { recallJson, remember } from "./base.js";
import { Spikes } from "./spikes.js";

const ROOM = 1_500_000; // characters for one tree; browsers give a site about five million
const VERSION = 1; // of what is stored
const FIELDS =
  "at message system answer state seed finish firstTokenMs result name saved note".split(" ");

const known = new Map(); // every turn that this page has seen, by id; also those that were removed

export class Turn {
  constructor(parent, message = "", system = "", id = newId()) {
    this.id = id;
    this.parent = parent;
    this.children = [];
    this.at = Date.now();
    this.message = message;
    this.system = system;
    this.answer = "";
    this.state = null; // the id of the server's state after the answer
    this.seed = null;
    this.finish = null;
    this.firstTokenMs = null;
    this.result = null; // what the last event said: usage, timings, the state's size
    this.spikes = null; // who fired, if that was asked for
    this.name = null;
    this.saved = false;
    this.note = "";
    parent?.children.push(this);
    known.set(id, this);
  }

  static from(record, parent) {
    const turn = new Turn(parent, "", "", record.id);
    for (const field of FIELDS) turn[field] = record[field] ?? turn[field];
    turn.spikes = record.spikes ? Spikes.from(record.spikes) : null;
    return turn;
  }

  // From the first turn to this one, without the root.
  get path() {
    const found = [];
    for (let turn = this; turn.parent; turn = turn.parent) found.unshift(turn);
    return found;
  }

  get asked() {
    const system = this.system ? [{ role: "system", content: this.system }] : [];
    return [...system, { role: "user", content: this.message }];
  }

  // The whole conversation up to this turn's message.
  get conversation() {
    const before = this.parent.path.flatMap((turn) => [
      ...turn.asked,
      { role: "assistant", content: turn.answer },
    ]);
    return [...before, ...this.asked];
  }

  get isThere() {
    return !this.parent || (this.parent.children.includes(this) && this.parent.isThere);
  }

  leave() {
    this.parent.children = this.parent.children.filter((turn) => turn !== this);
  }

  // As JSON; who fired at which token takes the most room.
  record(withShares) {
    const record = { id: this.id, parent: this.parent.id, spikes: this.spikes?.record(withShares) };
    for (const field of FIELDS) record[field] = this[field];
    return JSON.stringify(record);
  }
}

export const root = new Turn(null, "", "", "root");

export const turnOf = (id) => known.get(id);

// Not randomUUID: that is only there on secure origins.
function newId() {
  return `turn-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
}

// ---------------------------------------------------------------- stored

let place = null; // the name it is stored under; it is not known before the model is

// Adds the turns that are stored for a model. Returns the one that was current.
export function restore({ id, fingerprint }) {
  place ??= `tree.${id}.${fingerprint}`;
  return turnOf(adopt()?.current) ?? root;
}

// Stores all turns but `running`.
export function store(current, running) {
  if (!place) return;
  adopt();
  // When the browser has less room than that, the oldest branches go until what is left fits.
  for (let room = ROOM; room > 1000; room /= 2) {
    if (remember("localStorage", place, packed(room, current, running))) return;
  }
}

export function forget() {
  root.children = [];
  if (place) remember("localStorage", place, null);
}

// Takes the turns that are unknown here: at the beginning all, later those of another tab.
function adopt() {
  const stored = recallJson("localStorage", place);
  if (stored?.version !== VERSION) return null;
  try {
    for (const record of stored.turns) {
      const parent = turnOf(record.parent);
      if (!parent || turnOf(record.id)) continue;
      Turn.from(record, parent);
      parent.children.sort((a, b) => a.at - b.at);
    }
  } catch {
    // Changed by something else: what could be read is there.
  }
  return stored;
}

function packed(room, current, running) {
  const turns = [];
  const collect = (turn) => {
    turns.push(turn);
    for (const child of turn.children) if (child !== running) collect(child);
  };
  collect(root);
  turns.shift();
  const length = (texts) => texts.reduce((sum, text) => sum + text.length + 1, 0);
  let texts = turns.map((turn) => turn.record(true));
  if (length(texts) > room) texts = turns.map((turn) => turn.record(false));
  const left = new Map(turns.map((turn, i) => [turn, texts[i]]));
  const path = new Set(current.path);
  for (let excess = length(texts) - room; excess > 0; ) {
    const there = [...left.keys()];
    const parents = new Set(there.map((turn) => turn.parent));
    const ends = there.filter((turn) => !parents.has(turn) && !path.has(turn));
    if (!ends.length) break;
    const oldest = ends.reduce((a, b) => (b.at < a.at ? b : a));
    excess -= left.get(oldest).length + 1;
    left.delete(oldest);
  }
  const last = current === running ? current.parent : current;
  const head = JSON.stringify({ version: VERSION, current: last.id });
  return `${head.slice(0, -1)},"turns":[${[...left.values()].join(",")}]}`;
}
