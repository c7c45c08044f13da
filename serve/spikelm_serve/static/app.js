// The web page of `spikelm serve`: a conversation as a tree of turns.
//
// A turn is a message and its answer. It keeps the id of the server's state after the answer, and
// states never change: going on from any turn sends only the new message, and makes a new branch
// where the turn has been gone on from before.
//
// What the model says is hostile input: it reaches the page as text nodes, never as markup.

import { $, count, element, recall, recallJson, remember, tokens } from "./base.js";
import { call, ConnectionError, events, pause } from "./server.js";
import { redraw, showSpikes, Spikes } from "./spikes.js";
import { forget, restore, root, store, Turn, turnOf } from "./tree.js";

const PAUSES = [0.5, 1, 2, 4, 8, 15]; // seconds before each try to reach a lost answer again

let current = root; // the turn that the next message goes on from
let running = null; // the answer that is being streamed, see `run`
let isLeaving = false; // whether the page is being closed

// ---------------------------------------------------------------- asking

// The sampling fields of a request; empty ones are left to the server.
function sampling() {
  const fields = {};
  for (const input of $("controls").querySelectorAll("input[type=number]")) {
    if (input.value !== "") fields[input.name] = input.valueAsNumber;
  }
  const stop = $("controls").elements.stop.value.split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop.map((text) => text.replaceAll("\\n", "\n"));
  return fields;
}

function send() {
  const message = $("input").value.trim();
  if (!message || running || !controlsAreValid()) return;
  const system = current === root ? $("controls").elements.system.value.trim() : "";
  $("input").value = "";
  fitInput();
  answer(new Turn(current, message, system), current);
}

function regenerate(turn) {
  if (running || !controlsAreValid()) return;
  answer(new Turn(turn.parent, turn.message, turn.system), turn);
}

function controlsAreValid() {
  if ($("controls").checkValidity()) return true;
  openPanel("side");
  return $("controls").reportValidity();
}

// Streams the answer of a new turn. One that brought nothing is taken back, to `before`.
function answer(turn, before) {
  const fields = sampling();
  // The seed is chosen here, so that an answer can be repeated. With a fixed one, another answer
  // to the same message takes the next.
  const given = fields.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const twins = turn.parent.children.filter((other) => other.message === turn.message).length - 1;
  turn.seed = fields.seed === undefined ? given : given + twins;
  fields.seed = turn.seed;
  const isAsked = $("show-spikes").checked;
  turn.spikes = isAsked ? new Spikes() : null;
  if (isAsked) fields.return_spikes = true;
  run(turn, before, async () => {
    running.started = performance.now();
    try {
      await ask(turn, fields, turn.parent.state);
    } catch (error) {
      if (!error.isAboutState || !turn.parent.state || turn.answer) throw error;
      turn.note = `Sent the whole branch again: ${error.message}.`;
      turn.parent.state = null;
      await ask(turn, fields, null);
    }
  });
}

// Shows an answer that is running, and does what makes it.
async function run(turn, before, work, { stream = null, last = null } = {}) {
  running = {
    turn,
    controller: new AbortController(),
    stream, // its name on the server, once that has said it
    last, // the number of the last event that was taken
    isStopped: false,
    started: null, // when it was asked for, by performance.now()
    text: null, // where its text is shown
    status: null,
  };
  current = turn;
  closePanels();
  showAlert("");
  $("spoken").textContent = "";
  showAll();
  scrollToEnd();
  keepRunning();
  const failure = await work().then(
    () => null,
    (error) => error,
  );
  // Ends the request in any case, also where an error left its stream unread.
  running.controller.abort();
  running = null;
  // A reload makes requests fail too, while the page still runs.
  if (!isLeaving) remember("sessionStorage", "running", null);
  finished(turn, before, failure);
}

async function ask(turn, fields, from) {
  const body = {
    ...fields,
    messages: from ? turn.asked : turn.conversation,
    stream: true,
    stream_options: { include_usage: true, resumable: true },
    return_progress: true,
  };
  if (from) body.state = { from };
  const { signal } = running.controller;
  await follow(await call("v1/chat/completions", { body, signal }));
}

// Reads an answer to its end, over as many connections as that takes.
async function follow(response) {
  const { signal } = running.controller;
  for (let lost = 0; ; lost++) {
    try {
      response ??= await goOn(signal);
      for await (const { number, event } of events(response)) {
        lost = 0;
        take(running.turn, event);
        running.last = number;
        // More may be here already than what ended it.
        signal.throwIfAborted();
      }
      return;
    } catch (error) {
      const isLost = error instanceof ConnectionError && running.stream;
      if (!isLost || lost === PAUSES.length) throw error;
    }
    running.status.textContent = "Connection lost, trying again";
    $("spoken").textContent = running.status.textContent;
    await pause(PAUSES[lost], signal);
    response = null;
  }
}

// The events behind the last one that came; all of them if none did.
async function goOn(signal) {
  const headers = running.last === null ? {} : { "Last-Event-ID": running.last };
  const response = await call(`v1/streams/${running.stream}`, { headers, signal });
  running.status.textContent = "";
  return response;
}

function take(turn, event) {
  if (!running.stream) {
    running.stream = event.id;
    keepRunning();
    if (running.isStopped) return endStream();
  }
  const { delta, finish_reason, spikes } = event.choices?.[0] ?? {};
  if (event.prompt_progress) showProgress(event.prompt_progress);
  if (delta?.content) {
    if (running.started !== null) turn.firstTokenMs ??= performance.now() - running.started;
    turn.answer += delta.content;
    showMore(delta.content);
  }
  for (const step of spikes ?? []) turn.spikes?.add(step);
  if (spikes && turn === current) showSpikes(turn, true);
  turn.finish = finish_reason ?? turn.finish;
  if (event.timings) {
    const { usage, timings, cache_miss, state_bytes, spikes } = event;
    const state = event.state && { tokens: event.state.tokens };
    turn.result = { usage, timings, cache_miss, state_bytes, spikes, state };
  }
  // Only behind a whole message can a conversation go on.
  if (event.state?.role === "assistant") turn.state = event.state.id;
}

// Closing the connection does not end an answer that can be resumed: the server is told, as soon
// as its name is known. Who presses again does not want to wait for that.
function stop() {
  if (!running) return;
  if (running.stream || running.isStopped) endStream();
  else running.status.textContent = "Stopping";
  running.isStopped = true;
}

function endStream() {
  const { stream, controller } = running;
  // Where it is not reached, the answer ends when nobody has read it for a minute.
  if (stream) call(`v1/streams/${stream}`, { method: "DELETE" }).catch(() => {});
  controller.abort();
}

function finished(turn, before, failure) {
  const wasStopped = failure?.name === "AbortError";
  if (failure && !wasStopped && !failure.isAboutStream) showAlert(failure.message);
  if (failure && !turn.isThere) {
    // It was removed while it came.
  } else if (failure && !turn.answer && before) {
    turn.leave();
    if (current === turn) current = before;
    // A message that was typed, not an answer asked for again, goes back to where it was typed.
    if (before === turn.parent) giveBack(turn.message);
  } else if (failure) {
    const reason = failure.isAboutStream ? "the server does not have the rest" : failure.message;
    turn.note = wasStopped ? "Stopped." : `Cut off: ${reason}.`;
  }
  $("spoken").textContent = failure ? turn.note : turn.answer;
  const follows = isAtEnd();
  showAll();
  if (follows) scrollToEnd();
  keep();
}

// ---------------------------------------------------------------- over a reload

function keep() {
  store(current, running?.turn);
}

// What a reload needs to go on with the answer that is running. Only this tab does that, so the
// turn is not stored with the tree before it has ended.
function keepRunning() {
  const { turn, stream, last } = running;
  const record = `{"turn":${turn.record(true)},"stream":${JSON.stringify(stream)},"last":${last}}`;
  remember("sessionStorage", "running", record);
}

function resume() {
  const kept = recallJson("sessionStorage", "running");
  if (running || !kept?.turn) return;
  remember("sessionStorage", "running", null);
  const parent = turnOf(kept.turn.parent);
  if (!parent || turnOf(kept.turn.id)) return;
  if (!kept.stream) {
    // Nobody knows how to ask for the answer.
    goTo(parent);
    giveBack(kept.turn.message);
    return;
  }
  run(Turn.from(kept.turn, parent), null, () => follow(null), kept);
}

function giveBack(message) {
  if (!$("input").value) $("input").value = message;
  fitInput();
}

let isSure = false; // whether "Forget" has been pressed once

function forgetAll() {
  askForget(!isSure);
  if (isSure) return;
  stop();
  forget();
  goTo(root);
  $("input").focus();
}

function askForget(isAsking) {
  isSure = isAsking;
  $("forget").textContent = isSure ? "Forget all?" : "Forget";
  $("forget").classList.toggle("danger", isSure);
  if (isSure) $("spoken").textContent = "Press again to forget the whole tree";
}

async function showModel() {
  try {
    const { data } = await (await call("v1/models")).json();
    $("model").textContent = data[0].id;
    document.title = `${data[0].id} – spikelm`;
    showAlert("");
    const last = restore(data[0]);
    if (current === root && !running) goTo(last);
    else showAll();
    resume();
  } catch (error) {
    $("model").textContent = "";
    showAlert(error.message);
  }
}

// ---------------------------------------------------------------- the conversation

function goTo(turn) {
  current = turn;
  showAll();
  scrollToEnd();
  keep();
}

// The message goes back into the input; sent from the turn before, it starts a branch.
function edit(turn) {
  goTo(turn.parent);
  $("input").value = turn.message;
  fitInput();
  $("input").focus();
}

function showAll() {
  showChat();
  showTree();
  showBranch();
  showMeasured();
}

function showChat() {
  const { path } = current;
  $("chat").replaceChildren(...path.map(turnView));
  if (!path.length) {
    const welcome =
      "Every answer keeps the model's state. Choose a turn in the tree to go back to it; " +
      "the next message starts a branch there, and only that message is read.";
    $("chat").append(element("p", { className: "welcome", textContent: welcome }));
  }
  const others = current.children.length;
  const branches = others === 1 ? "another branch" : `${others} other branches`;
  const hint = `The next message starts a branch here, beside ${branches}.`;
  $("hint").textContent = others ? hint : "";
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function turnView(turn) {
  const view = element("article", { className: "turn" });
  const add = (className, text) => {
    const part = element("p", { className, textContent: text });
    view.append(part);
    return part;
  };
  if (turn.system) add("system", turn.system);
  add("message", turn.message);
  const said = add("answer", turn.answer);
  if (running?.turn === turn) {
    // A text node of its own: appending to it does not copy what is there.
    running.text = said.firstChild ?? said.appendChild(document.createTextNode(""));
    running.status = add("quiet", "");
    view.setAttribute("aria-busy", "true");
    said.classList.add("running");
    return view;
  }
  if (turn.note) add("note", turn.note);
  view.append(actions(turn));
  return view;
}

function actions(turn) {
  const button = (textContent, title, onclick, disabled = Boolean(running)) =>
    element("button", { textContent, title, ariaLabel: title, onclick, disabled });
  const row = element("div", { className: "actions" });
  const { children } = turn.parent;
  const at = children.indexOf(turn);
  if (children.length > 1) {
    row.append(
      button("‹", "Branch before", () => goBeside(turn, -1), at === 0),
      element("span", { textContent: `${at + 1}/${children.length}` }),
      button("›", "Next branch", () => goBeside(turn, 1), at === children.length - 1),
    );
  }
  row.append(
    button("Regenerate", "Another answer, as a branch", () => regenerate(turn)),
    button("Edit", "Change the message, as a branch", () => edit(turn)),
  );
  const { usage, timings } = turn.result ?? {};
  const facts = [];
  if (usage) facts.push(tokens(usage.completion_tokens));
  if (timings?.predicted_per_second) facts.push(`${rate(timings)}/s`);
  if (turn.finish === "length") facts.push("cut at max tokens");
  facts.push(`seed ${turn.seed}`);
  row.append(element("span", { className: "facts", textContent: facts.join(" · ") }));
  return row;
}

// To the end of the branch before or after: its newest turn.
function goBeside(turn, step) {
  const { children } = turn.parent;
  let found = children[children.indexOf(turn) + step];
  const beside = found;
  while (found.children.length) found = found.children.at(-1);
  goTo(found);
  // The button that was pressed is gone; the same one of the other branch takes its place.
  const view = $("chat").children[beside.path.length - 1];
  const [back, next] = view.querySelectorAll(".actions button");
  const [wanted, other] = step < 0 ? [back, next] : [next, back];
  (wanted.disabled ? other : wanted).focus();
}

function showMore(text) {
  const follows = isAtEnd();
  running.text.appendData(text);
  running.status.textContent = "";
  if (running.turn === current) $("first").textContent = milliseconds(running.turn.firstTokenMs);
  if (follows) scrollToEnd();
}

function showProgress({ processed, total }) {
  if (!running.turn.answer) running.status.textContent = `Reading: ${processed} of ${total} tokens`;
}

// Whoever scrolled up to read stays there.
function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("chat");
  return scrollHeight - scrollTop - clientHeight < 40;
}

function scrollToEnd() {
  $("chat").scrollTop = $("chat").scrollHeight;
}

function showAlert(text) {
  $("alert").hidden = !text;
  $("alert").firstElementChild.textContent = text;
}

// ---------------------------------------------------------------- the tree panel

let listed = []; // the turns in the order of their rows
let focused = root; // the one row that Tab reaches

function showTree() {
  const tree = $("tree");
  const hadFocus = tree.contains(document.activeElement);
  if (!hadFocus) focused = current;
  const branch = new Set([root, ...current.path]);
  const rows = [];
  listed = [];
  const add = (turn, level, indent) => {
    listed.push(turn);
    rows.push(rowView(turn, level, indent, branch));
    // Only branches are indented: a long conversation stays readable in a narrow panel.
    const deeper = indent + (turn.children.length > 1 ? 1 : 0);
    for (const child of turn.children) add(child, level + 1, deeper);
  };
  add(root, 1, 0);
  tree.replaceChildren(...rows);
  if (hadFocus) focusRow(listed.includes(focused) ? focused : current);
  else $(current.id).scrollIntoView({ block: "nearest" });
}

function rowView(turn, level, indent, branch) {
  const siblings = turn.parent?.children ?? [turn];
  const row = element("div", { id: turn.id, role: "treeitem", tabIndex: -1, className: "item" });
  row.ariaLevel = level;
  row.ariaSetSize = siblings.length;
  row.ariaPosInSet = siblings.indexOf(turn) + 1;
  row.ariaSelected = turn === current;
  row.style.setProperty("--indent", Math.min(indent, 8));
  row.classList.toggle("on-branch", branch.has(turn));
  row.classList.toggle("branch-start", siblings.length > 1);
  if (turn === focused) row.tabIndex = 0;
  const name = turn.saved ? `◆ ${turn.name ?? "saved"}` : "";
  if (name) row.append(element("span", { className: "saved", textContent: name }));
  const message = turn === root ? "Beginning" : turn.message;
  row.append(element("span", { className: "asked", textContent: message }));
  if (turn.answer) row.append(element("span", { className: "said", textContent: turn.answer }));
  row.onclick = () => choose(turn);
  return row;
}

function choose(turn) {
  focused = turn;
  goTo(turn);
  closePanels();
}

function focusRow(turn) {
  $(focused.id)?.setAttribute("tabindex", "-1");
  focused = turn;
  $(turn.id).tabIndex = 0;
  $(turn.id).focus();
}

function treeKey(event) {
  const at = listed.indexOf(focused);
  const near = {
    ArrowUp: listed[at - 1],
    ArrowDown: listed[at + 1],
    ArrowLeft: focused.parent,
    ArrowRight: focused.children[0],
    Home: root,
    End: listed.at(-1),
  };
  if (event.key in near) {
    if (near[event.key]) focusRow(near[event.key]);
  } else if (event.key === "Enter" || event.key === " ") {
    choose(focused);
  } else if (event.key === "F2") {
    goTo(focused);
    $("name").focus();
  } else if (event.key === "Delete") {
    remove(focused);
  } else {
    return;
  }
  event.preventDefault();
}

function showBranch() {
  $("name").value = current.name ?? "";
  $("name").disabled = $("save").disabled = !current.state;
  $("remove").disabled = current === root;
  $("forget").disabled = !root.children.length;
}

async function save() {
  const turn = current;
  try {
    const body = { name: $("name").value.trim() || null };
    const state = await (await call(`v1/states/${turn.state}/save`, { body })).json();
    turn.name = state.name;
    turn.saved = true;
    showAlert("");
    showTree();
    keep();
  } catch (error) {
    showAlert(error.message);
  }
}

// Forgets a turn and all behind it. The server keeps its states for as long as it likes.
function remove(turn) {
  const behind = turn.children.length ? " and all that follows it" : "";
  if (turn === root || !confirm(`Remove “${turn.message.slice(0, 60)}”${behind}?`)) return;
  if (running?.turn.path.includes(turn)) stop();
  const wasCurrent = current.path.includes(turn);
  turn.leave();
  focused = turn.parent;
  if (wasCurrent) goTo(turn.parent);
  else showTree();
  keep();
}

// ---------------------------------------------------------------- measurements

const rate = (timings) => count(Math.round(timings.predicted_per_second));
const milliseconds = (number) => (number === null ? "–" : `${count(Math.round(number))} ms`);

const MISSES = {
  no_prefix: "No state had read the beginning of this prompt.",
  evicted: "The state of this beginning had left the server's memory.",
  disabled: "This request was not to use states.",
};

// Of the current turn: going back in the tree goes back to its numbers.
function showMeasured() {
  const { usage, timings, cache_miss, state_bytes } = current.result ?? {};
  $("speed").textContent = timings?.predicted_per_second ? `${rate(timings)} tokens/s` : "–";
  $("first").textContent = milliseconds(current.firstTokenMs);
  const cached = usage?.prompt_tokens_details.cached_tokens;
  $("cached").textContent = usage ? `${count(cached)} of ${tokens(usage.prompt_tokens)}` : "–";
  $("cached-bar").value = usage?.prompt_tokens ? cached / usage.prompt_tokens : 0;
  $("miss").textContent = cache_miss ? (MISSES[cache_miss] ?? cache_miss) : "";
  $("bytes").textContent = state_bytes ? `${count(state_bytes)} bytes` : "–";
  showGrowth();
  showSpikes(current, current === running?.turn);
}

// The bytes of the state over the tokens it has read, as they were measured along this branch.
function showGrowth() {
  const points = current.path
    .filter((turn) => turn.result?.state)
    .map(({ result }) => ({ read: result.state.tokens, bytes: result.state_bytes }));
  const most = Math.max(...points.map((point) => point.bytes));
  const longest = points.at(-1)?.read;
  const line = points.map(({ read, bytes }) => [(read / longest) * 200, 40 - (bytes / most) * 26]);
  // One measurement is drawn as a line too: the state has its size before the first token.
  if (line.length) line.unshift([0, line[0][1]]);
  $("bytes-plot").firstElementChild.setAttribute("points", line.join(" "));
  $("growth").textContent = growth(points);
}

function growth(points) {
  if (!points.length) return "";
  const [first, last] = [points[0], points.at(-1)];
  if (points.length === 1) return `After ${tokens(first.read)}.`;
  const isConstant = points.every((point) => point.bytes === first.bytes);
  const size = isConstant ? "The same" : "Not the same";
  return `${size} after ${count(first.read)} and after ${tokens(last.read)}.`;
}

// ---------------------------------------------------------------- controls, theme, panels

function restoreControls() {
  const stored = recallJson("localStorage", "controls") ?? {};
  for (const field of $("controls").elements) {
    const value = stored[field.name];
    if (!field.name || typeof value !== "string") continue;
    if (field.type === "checkbox") field.checked = value === "on";
    else field.value = value;
  }
  $("key").value = recall("sessionStorage", "key") ?? "";
}

function storeControls() {
  // The key has no name, so it is not among these: it stays in this tab's session.
  const fields = { spikes: "off", ...Object.fromEntries(new FormData($("controls"))) };
  remember("localStorage", "controls", JSON.stringify(fields));
  remember("sessionStorage", "key", $("key").value);
}

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = THEMES[theme];
  $("theme").ariaLabel = $("theme").title = `Theme: ${theme}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const shown = document.documentElement.dataset.theme;
  const next = names[(names.indexOf(shown) + 1) % names.length];
  remember("localStorage", "theme", next);
  showTheme(next);
  redraw();
}

// In a narrow window the panels lie over the conversation, one at a time.
function openPanel(name) {
  for (const each of ["tree", "side"]) {
    const isOpen = each === name;
    $(`${each}-panel`).classList.toggle("open", isOpen);
    $(`show-${each}`).ariaExpanded = isOpen;
  }
}

function closePanels() {
  openPanel(null);
}

function togglePanel(name) {
  openPanel($(`${name}-panel`).classList.contains("open") ? null : name);
}

// As high as its text, within what the style sheet allows.
function fitInput() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

// ---------------------------------------------------------------- events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  // Enter also ends the composition of a character.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
$("alert").lastElementChild.addEventListener("click", () => showAlert(""));
$("new").addEventListener("click", () => {
  choose(root);
  $("input").focus();
});
$("theme").addEventListener("click", nextTheme);
$("show-tree").addEventListener("click", () => togglePanel("tree"));
$("show-side").addEventListener("click", () => togglePanel("side"));
$("tree").addEventListener("keydown", treeKey);
$("branch").addEventListener("submit", (event) => {
  event.preventDefault();
  save();
});
$("remove").addEventListener("click", () => remove(current));
$("forget").addEventListener("click", forgetAll);
$("forget").addEventListener("blur", () => askForget(false));
$("controls").addEventListener("submit", (event) => event.preventDefault());
// One of the settings stands outside of the form.
$("side-panel").addEventListener("input", storeControls);
$("controls").addEventListener("reset", () => {
  // The fields have their defaults after this event; the key is not one of the settings.
  const key = $("key").value;
  setTimeout(() => {
    $("key").value = key;
    storeControls();
    redraw();
  });
});
$("key").addEventListener("change", showModel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running) stop();
    else closePanels();
  } else if (event.key === "/" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    closePanels();
    $("input").focus();
  }
});

const theme = recall("localStorage", "theme");
showTheme(theme in THEMES ? theme : "auto");
restoreControls();
showAll();
showModel();
addEventListener("pagehide", () => {
  isLeaving = true;
  if (running) keepRunning();
});
addEventListener("pageshow", () => (isLeaving = false));
$("input").focus();
