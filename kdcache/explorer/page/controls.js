// Controls: the tints, finding, keys, views and themes of the page. Each takes the state, whose methods change it.

/** The choice of what tints the text. */
function makeTints(state) {
  for (const name of Object.keys(TINTS).filter((each) => each !== "kl" || state.known.kl)) {
    const known = state.known[name];
    const checked = name === state.tint;
    const input = make("input", { type: "radio", name: "tint", value: name, checked, disabled: !known });
    input.addEventListener("change", () => state.tintBy(name));
    const title = known ? TINTS[name].about : "This cache does not know it.";
    byId("tints").append(make("label", { title }, input, make("span", {}, TINTS[name].title)));
  }
}

/** Where it is looked: of a served cache, only in the rows that were read. */
function among(state) {
  const count = thousands(state.rows.length);
  return state.cache.live ? `in the ${count} rows read so far` : `in ${count} rows`;
}

/** Search for a text, and step through its matches; of a served cache also in the rows that were not read. */
function makeSearch(state) {
  let hits = []; // [row or its number, first token]
  let at = -1;
  let where = ""; // what was looked through

  async function next(by) {
    if (!hits.length) return;
    at = (at + by + hits.length) % hits.length;
    const now = at;
    const [found, token] = hits[now];
    const row = typeof found === "number" ? await state.rowAt(found) : found;
    if (!row || at !== now) return;
    state.choose(row, token);
    state.tell(`match ${thousands(at + 1)} of ${thousands(hits.length)} ${where}`);
  }

  /** Mark the matches among the rows that are there; they are what is stepped through, unless all of a cache is. */
  state.look = ({ keep = false } = {}) => {
    const wanted = byId("search").value;
    const here = search(state.rows, wanted);
    state.rows.forEach((row) => tintRow(state, row));
    if (keep) return;
    whole?.stop();
    [hits, at, where] = [here, -1, among(state)];
    state.tell(wanted ? `${thousands(hits.length)} matches ${where}` : "");
  };

  const whole = state.cache.live ? makeWholeSearch(state, (found, looked) => {
    [hits, where] = [found, `in ${looked}`];
    state.keepHits = true;
    state.tell(`${thousands(hits.length)} matches ${where}`);
  }, () => {
    at = -1;
    next(1);
  }) : null;
  byId("search").addEventListener("input", () => {
    state.keepHits = false;
    state.look();
  });
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") next(event.shiftKey ? -1 : 1);
  });
  byId("search-back").addEventListener("click", () => next(-1));
  byId("search-on").addEventListener("click", () => next(1));
}

/**
 * A button that searches a served cache from its first row to its last, and stops when it is pressed again. The server
 * looks for half a second at a time. `found` is told of all matches so far, `ended` that there are no more.
 */
function makeWholeSearch(state, found, ended) {
  const title = "In the whole cache";
  const button = make("button", { type: "button", class: "quiet", id: "search-whole" }, title);
  let running = null;

  async function run() {
    const text = byId("search").value;
    if (!text) {
      byId("search").focus();
      return;
    }
    const mine = new AbortController();
    running = mine;
    button.replaceChildren("Stop");
    const [low, high] = state.cache.head.range;
    const all = [];
    let complete = false;
    try {
      for (let from = low; from !== null; ) {
        const reply = await fetch(`find?text=${encodeURIComponent(text)}&from=${from}`, { signal: mine.signal });
        const answer = await reply.json();
        if (!reply.ok) throw new Error(answer.error);
        all.push(...answer.matches);
        from = all.length < MOST_FOUND ? answer.next : null;
        complete = answer.next === null;
        const looked = answer.next === null ? high + 1 : answer.next;
        const rows = thousands(high - low + 1);
        found(all, complete ? `all ${rows} rows` : `the first ${thousands(looked - low)} of ${rows} rows`);
      }
    } catch (error) {
      if (error.name !== "AbortError") state.tell(`the search has stopped: ${error.message}`);
    }
    if (running !== mine) return;
    running = null;
    button.replaceChildren(title);
    if (all.length && byId("search").value === text) ended();
  }

  const stop = () => {
    running?.abort();
    running = null;
    button.replaceChildren(title);
  };
  button.addEventListener("click", () => (running ? running.abort() : run()));
  byId("search-on").after(button);
  return { stop };
}

const MOST_FOUND = 10000;

/** Step through the positions with the largest values of a kind. */
function makeExtremes(state) {
  state.extreme = (kind) => {
    if (!state.known[kind]) return;
    const ranks = (state.ranks[kind] ??= { places: ranked(state.rows, kind), at: -1 });
    if (!ranks.places.length) {
      state.tell(`nothing is known of that ${among(state)}`);
      return;
    }
    ranks.at = (ranks.at + 1) % ranks.places.length;
    state.choose(...ranks.places[ranks.at], { focus: true });
    state.tell(`${ranks.at ? `${ordinal(ranks.at + 1)} ` : ""}${EXTREMES[kind].title} ${among(state)}`);
  };
  for (const kind of Object.keys(EXTREMES).filter((each) => each !== "kl" || state.known.kl)) {
    const button = make("button", { type: "button", disabled: !state.known[kind] }, EXTREMES[kind].title);
    button.addEventListener("click", () => state.extreme(kind));
    byId("extremes").append(button);
  }
}

const KEYS = [
  ["← →", "the token before, the token after"],
  ["↑ ↓", "the token above, the token below"],
  ["Home End", "the first token of the row, the last"],
  ["Page Up, Page Down", "the row before, the row after"],
  ["s", "the most surprising position, then the next"],
  ["e", "the least sure position, then the next"],
  ["d", "the largest disagreement, then the next"],
  ["t", "the next tint"],
  ["[ ]", "the stored temperature below, above"],
  ["− +", "one entry less, one more"],
  ["/", "search"],
];

/** What a key does while a row has the focus, by key. */
function commandsOf(state) {
  const { cache } = state;
  const near = { near: true };

  function otherTemperature(by) {
    const stored = [...cache.temperatures].sort((a, b) => a - b);
    const next = by > 0 ? stored.find((T) => T > state.T) : stored.findLast((T) => T < state.T);
    if (next !== undefined) state.changed({ T: next });
  }

  function otherWidth(by) {
    if (cache.sampled) return;
    const k = Math.min(state.k, cache.top + 1) + by;
    state.changed({ k: k > cache.top ? cache.width : Math.max(1, k) });
  }

  function line(by) {
    const next = onNextLine(state.row, state.token, by);
    if (next < 0) state.otherRow(by);
    else state.choose(state.row, next, near);
  }

  function nextTint() {
    const inputs = [...byId("tints").querySelectorAll("input:enabled")];
    inputs[(inputs.findIndex((input) => input.checked) + 1) % inputs.length].click();
  }

  /** 1 where text runs from left to right, else -1. */
  const forward = () => (getComputedStyle(state.row.spans[state.token].parentElement).direction === "rtl" ? -1 : 1);
  return {
    ArrowLeft: () => state.step(-forward()),
    ArrowRight: () => state.step(forward()),
    ArrowUp: () => line(-1),
    ArrowDown: () => line(1),
    Home: () => state.choose(state.row, 0, near),
    End: () => state.choose(state.row, state.row.spans.length - 1, near),
    PageUp: () => state.otherRow(-1),
    PageDown: () => state.otherRow(1),
    s: () => state.extreme("surprise"),
    e: () => state.extreme("entropy"),
    d: () => state.extreme("kl"),
    t: nextTint,
    "[": () => otherTemperature(-1),
    "]": () => otherTemperature(1),
    "-": () => otherWidth(-1),
    "+": () => otherWidth(1),
    "=": () => otherWidth(1),
    "/": () => byId("search").focus(),
  };
}

/** Keys of the text, and the list of them. */
function makeKeys(state) {
  const commands = commandsOf(state);
  byId("rows").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.row || !commands[event.key]) return;
    event.preventDefault();
    commands[event.key]();
  });
  for (const [keys, what] of KEYS) {
    byId("help-keys").append(make("div", {}, make("dt", {}, make("kbd", {}, keys)), make("dd", {}, what)));
  }
  byId("keys").addEventListener("click", () => byId("help").showModal());
}

const TABS = ["text", "summary"];

/** The two views. */
function makeViews(state) {
  function open(name) {
    for (const each of TABS) {
      byId(each).hidden = each !== name;
      byId(`tab-${each}`).setAttribute("aria-selected", String(each === name));
      byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
    }
    if (name === "summary") showSummary(state);
    document.body.dataset.view = name;
  }
  for (const name of TABS) {
    byId(`tab-${name}`).addEventListener("click", () => open(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = TABS.find((each) => each !== name);
      open(other);
      byId(`tab-${other}`).focus();
    });
  }
  addEventListener("beforeprint", () => showSummary(state));
  open("text");
}

const THEMES = ["system", "light", "dark"];

function makeThemes() {
  byId("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    dataset.theme = THEMES[(THEMES.indexOf(dataset.theme ?? "system") + 1) % THEMES.length];
    byId("theme").textContent = `Theme: ${dataset.theme}`;
  });
}
