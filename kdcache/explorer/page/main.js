// Main: the state of the page, what changes it, and where its rows come from.

const PER_LOOK = 8; // rows that a served page reads at a time

/** What the page knows of a cache before any row. */
function cacheOf(head) {
  const { summary } = head;
  const about = (part) => ({
    sampled: part.sampled,
    temperatures: part.temperatures,
    order: part.temperatures.map((_, i) => i).sort((a, b) => part.temperatures[a] - part.temperatures[b]),
    vocabulary: summary.vocab_size,
  });
  return {
    ...about(head),
    head,
    top: head.top,
    width: head.width,
    complete: head.everything && head.top === head.width,
    live: head.live,
    comparing: head.compare,
    second: head.compare && about(head.compare),
  };
}

/** The state of the page at its start, with the methods that change it. */
function makeState(head) {
  const cache = cacheOf(head);
  const { known } = head.summary;
  const state = {
    cache,
    known: { surprise: true, entropy: known.entropy, tail: !cache.sampled, kl: Boolean(cache.comparing) },
    rows: [],
    row: null, // the chosen token is `token` of `row`
    token: 0,
    tint: "surprise",
    T: cache.temperatures.includes(1) ? 1 : cache.temperatures[0],
    k: cache.width,
    all: false, // whether all entries are listed
    ranks: {},
    keepHits: false, // whether the matches are those of the whole cache, not of the rows that were read
  };
  const button = (text, label, does, kind = "quiet") => {
    const made = make("button", { type: "button", class: kind, "aria-label": label }, text);
    made.addEventListener("click", does);
    return made;
  };
  const more = button("Show all entries", null, () => state.changed({ all: true }), "quiet more");
  const sliders = makeSliders(state, (values) => state.changed(values));
  const back = button("‹", "Token before", () => state.step(-1));
  const on = button("›", "Token after", () => state.step(1));
  const parts = makePanel(byId("position"), sliders, back, on);

  state.tell = (text) => byId("found").replaceChildren(text);

  /** Show a token in the panel, without choosing it. */
  state.show = (row, token) => {
    if (row) showPosition(state, parts, row, token, more);
    sliders.show();
  };

  /** Choose a token: show it, and go there; `near` moves the text no more than needed, `quiet` not at all. */
  state.choose = (row, token, { focus = false, quiet = false, near = false } = {}) => {
    if (state.row) mark(state.row, state.token, false);
    if (state.row !== row || state.token !== token) state.all = false;
    [state.row, state.token] = [row, token];
    mark(row, token, true);
    state.show(row, token);
    if (focus) row.text.focus({ preventScroll: true });
    if (quiet) return;
    row.spans[token].scrollIntoView({ block: near ? "nearest" : "center" });
    byId("says").textContent = inWords(row, token);
  };

  state.step = (by) => {
    const next = state.token + by;
    if (next >= 0 && next < state.row.spans.length) state.choose(state.row, next, { near: true });
  };

  state.otherRow = (by) => {
    const elements = [...byId("rows").children];
    const next = elements[elements.findIndex((element) => element.row === state.row) + by];
    if (next) state.choose(next.row, Math.min(1, next.row.spans.length - 1), { focus: true });
  };

  state.changed = (values) => {
    Object.assign(state, values);
    state.show(state.row, state.token);
    if (state.tint === "tail") requestAnimationFrame(() => state.rows.forEach((row) => tintRow(state, row)));
    if (!byId("summary").hidden) showSummary(state);
  };

  state.tintBy = (name) => {
    state.tint = name;
    drawScale(state);
    state.rows.forEach((row) => tintRow(state, row));
  };

  /** Add a row to the text, in front of an element or at the end. */
  state.add = (row, before) => {
    const element = rowElement(row);
    element.row = row;
    tintRow(state, row);
    byId("rows").insertBefore(element, before ?? null);
    state.rows.push(row);
    state.ranks = {};
  };
  return state;
}

/** What the pointer and the focus do to the rows. */
function listenToRows(state) {
  const list = byId("rows");
  const tokenAt = (event) => {
    const span = event.target.closest?.("[role=option]");
    return span ? [span.closest(".running").row, span.token] : null;
  };
  list.addEventListener("click", (event) => {
    const at = tokenAt(event);
    if (at) state.choose(...at, { focus: true, near: true });
  });
  list.addEventListener("focusin", (event) => {
    const { row } = event.target;
    if (row && row !== state.row) state.choose(row, Math.min(1, row.spans.length - 1), { near: true });
  });
  if (!matchMedia("(hover: hover)").matches) return;
  list.addEventListener("pointerover", (event) => {
    const at = tokenAt(event);
    if (at) state.show(...at);
  });
  list.addEventListener("pointerleave", () => state.show(state.row, state.token));
}

/** Name the cache at the head of the page. */
function nameCache(cache) {
  const { summary } = cache.head;
  const last = (path) => path.replace(/\/+$/, "").split("/").at(-1) || path;
  byId("name").textContent = last(summary.cache);
  document.title = `${last(summary.cache)} · kdcache`;
  const compared = cache.comparing ? [" · compared with ", make("bdi", {}, last(cache.comparing.name))] : [];
  byId("told").append(
    make("bdi", {}, last(String(summary.teacher ?? "a teacher"))),
    ` · ${settings(summary.selection)} · T ${summary.temperatures.map(degrees).join(", ")}`,
    ` · ${thousands(summary.positions)} positions, ${summary.bytes_per_position.toFixed(0)} bytes each`,
    ...compared,
  );
}

/** Make the page of a head and its first rows. */
function start(head, rows) {
  const state = makeState(head);
  nameCache(state.cache);
  makeTints(state);
  makeSearch(state);
  makeExtremes(state);
  makeKeys(state);
  makeThemes();
  listenToRows(state);
  rows.forEach((row) => state.add(row));
  state.tintBy(state.tint);
  makeViews(state);
  const first = rows.find((row) => row.targets.count.length) ?? rows[0];
  if (first) {
    const token = first.places.findIndex((m) => m >= 0) + 1;
    state.choose(first, Math.min(token, first.tokens.length - 1), { quiet: true });
  }
  return state;
}

const withTable = (row, table) => Object.assign(row, { ids: table.ids });

/** A row of the server, with its own table of texts. */
async function fetchRow(head, index) {
  const reply = await fetch(`rows/${index}`);
  const payload = await reply.json();
  if (!reply.ok) throw new Error(payload.error);
  const row = await unpackRow(payload, payload.texts.texts, head.temperatures, head.compare?.temperatures);
  return withTable(row, payload.texts);
}

/** Rows that are read as they are looked at, with the controls to do so. */
async function serve(head) {
  const [low, high] = head.range;
  const state = start(head, [await fetchRow(head, low)]);
  const list = byId("rows");
  let reading = Promise.resolve();

  async function readNow(from, to) {
    for (let index = from; index <= Math.min(to, high); index++) {
      if (state.rows.some((row) => row.index === index)) continue;
      try {
        const row = await fetchRow(head, index);
        state.add(row, [...list.children].find((element) => element.row.index > index));
      } catch (error) {
        state.tell(`row ${index} cannot be read: ${error.message}`);
        break;
      }
    }
    if (byId("search").value) state.look({ keep: state.keepHits });
  }

  /** Read some rows, one after the other, behind those that are being read. */
  function read(from, to) {
    reading = reading.then(() => readNow(from, to));
    return reading;
  }

  state.rowAt = async (index) => {
    await read(index, index);
    return state.rows.find((row) => row.index === index);
  };

  const number = make("input", { type: "number", id: "row-number", min: low, max: high, value: low });
  const form = make(
    "form", {}, make("label", { for: "row-number" }, "Row"), number,
    make("span", {}, `of ${thousands(low)} to ${thousands(high)}`), make("button", { type: "submit" }, "Go"),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const index = Math.min(high, Math.max(low, Math.round(Number(number.value)) || low));
    const row = await state.rowAt(index);
    if (row) state.choose(row, Math.min(1, row.spans.length - 1), { focus: true });
    await read(index + 1, index + PER_LOOK - 1);
  });
  const more = make("button", { type: "button" }, "Read more rows");
  more.addEventListener("click", () => {
    const last = Math.max(...state.rows.map((row) => row.index));
    read(last + 1, last + PER_LOOK);
  });
  byId("goto").append(form);
  byId("more").append(more);
  byId("goto").hidden = byId("more").hidden = false;
  await read(low + 1, low + PER_LOOK - 1);
}

async function open() {
  const { texts, rows, ...head } = JSON.parse(byId("data").textContent);
  Object.assign(TINTS, head.tints);
  if (head.live) return serve(head);
  const second = head.compare?.temperatures;
  const unpacked = await Promise.all(rows.map((payload) => unpackRow(payload, texts.texts, head.temperatures, second)));
  return start(head, unpacked.map((row) => withTable(row, texts)));
}

open()
  .then(() => {
    document.body.dataset.ready = "";
  })
  .catch((error) => {
    byId("told").textContent = `The page cannot be shown: ${error.message}`;
    throw error;
  });
