// Position: one target as bars, at a temperature and a number of entries.

const LISTED = 14;
const CONTEXT = 24;

/** Where T stands on the slider, which is logarithmic. */
const onSlider = (T) => Math.log2(T).toFixed(3);

const STEP = 0.02;

/** The T of a place on the slider: a stored one where it is near, nearer than a step unless it is dragged there. */
function fromSlider(cache, place, dragged) {
  const reach = STEP * (dragged ? 2.2 : 0.55);
  const near = cache.temperatures.find((T) => Math.abs(Math.log2(T) - place) < reach);
  return near ?? Number((2 ** place).toPrecision(3));
}

function statistic(name, value, unit) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value, unit ? make("small", {}, ` ${unit}`) : null));
}

/** The sliders; they outlive the position, so that they keep the focus while they are moved. */
function makeSliders(state, changed) {
  const { cache } = state;
  const low = Math.min(0.25, ...cache.temperatures);
  const high = Math.max(4, ...cache.temperatures);
  const most = cache.top < cache.width ? cache.top + 1 : cache.top; // its last place is the whole width
  const heat = make("input", {
    type: "range",
    id: "heat",
    min: onSlider(low),
    max: onSlider(high),
    step: String(STEP),
    value: onSlider(state.T),
    list: "stored",
    disabled: cache.sampled,
  });
  const exact = cache.temperatures.map((T) =>
    make("button", { type: "button", class: "stored", "data-t": String(T) }, `T ${degrees(T)}`),
  );
  const keep = make("input", {
    type: "range",
    id: "keep",
    min: "1",
    max: String(most),
    step: "1",
    disabled: cache.sampled,
  });
  const heatSays = make("output", { for: "heat", id: "heat-says" });
  const keepSays = make("output", { for: "keep", id: "keep-says" });
  let dragged = false;
  heat.addEventListener("pointerdown", () => {
    dragged = true;
  });
  heat.addEventListener("keydown", () => {
    dragged = false;
  });
  heat.addEventListener("input", () => changed({ T: fromSlider(cache, Number(heat.value), dragged) }));
  keep.addEventListener("input", () =>
    changed({ k: Number(keep.value) > cache.top ? cache.width : Number(keep.value) }),
  );
  exact.forEach((button) => button.addEventListener("click", () => changed({ T: Number(button.dataset.t) })));
  const sliders = make(
    "div",
    { class: "sliders" },
    make(
      "div",
      { class: "slider" },
      make("label", { for: "heat" }, "Temperature"),
      heatSays,
      heat,
      make(
        "datalist",
        { id: "stored" },
        ...cache.temperatures.map((T) => make("option", { value: onSlider(T), label: degrees(T) })),
      ),
      make("span", { class: "exact" }, "stored, exact: ", ...exact),
    ),
    make("div", { class: "slider" }, make("label", { for: "keep" }, "Entries kept"), keepSays, keep),
  );
  sliders.show = () => {
    heat.value = onSlider(state.T);
    keep.value = String(Math.min(most, state.k));
    const stored = cache.temperatures.includes(state.T);
    heatSays.textContent = cache.sampled
      ? `T ${degrees(state.T)}, drawn there`
      : `T ${degrees(state.T)}, ${stored || cache.complete ? "exact" : "tail interpolated"}`;
    heat.setAttribute("aria-valuetext", heatSays.textContent);
    heatSays.classList.toggle("about", !stored);
    keepSays.textContent =
      state.k < cache.width ? `${state.k} of ${thousands(cache.width)}` : `all ${thousands(cache.width)}`;
    keep.setAttribute("aria-valuetext", keepSays.textContent);
    exact.forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.t) === state.T)));
  };
  return sliders;
}

/** One bar of the list: a share of the teacher, and one of what it is compared with. */
function barRow(scale, name, own, other, kind, title) {
  const bar = (value, which) => {
    const made = make("span", { class: `share ${which}` });
    made.style.inlineSize = `${Math.min(1, value / scale) * 100}%`;
    return made;
  };
  const twice = other !== undefined;
  return make(
    "tr",
    { class: kind, title: title ?? null },
    make("th", { scope: "row" }, name),
    make("td", { class: "bars" }, bar(own, "own"), twice ? bar(other ?? 0, "other") : null),
    make(
      "td",
      { class: "number" },
      share(own),
      twice ? make("span", { class: "other" }, other === null ? "less" : share(other)) : null,
    ),
  );
}

/** The name of an entry: its token, and whether it is the true next one. */
function entryName(text, isTrue, drawn) {
  return make(
    "span",
    { class: "entry" },
    make("bdi", {}, alone(text)),
    isTrue ? make("span", { class: "true" }, "true") : null,
    drawn ? make("span", { class: "drawn" }, "drawn") : null,
  );
}

/** Why a token has no target. */
function whyNone(row, token) {
  const firsts = new Set([0]);
  row.pieces.reduce((at, length) => (firsts.add(at + length), at + length), 0);
  if (firsts.has(token)) return "It is the first token of its piece: nothing precedes it there.";
  return row.slots[token - 1] === 1
    ? "The position filter of this cache left its target out."
    : "It is not supervised, so it has no target.";
}

/** The bars of a target: its entries, those below k faded, the rest of them, and the tail. */
function barsOf(state, row, m, label, found) {
  const { cache, k } = state;
  const { targets } = row;
  const from = targets.start[m];
  const otherAt = row.otherPlaces ? row.otherPlaces[row.places.indexOf(m)] : -1;
  const second = otherAt >= 0 ? atTemperature(cache.second, row.other, otherAt, state.T) : null;
  const secondIds = second
    ? Array.from(row.other.ids.subarray(row.other.start[otherAt], row.other.start[otherAt + 1]))
    : [];
  const shareThere = (id) => {
    if (!second) return undefined;
    const place = secondIds.indexOf(id);
    return place < 0 ? null : second.shares[place];
  };
  const kept = Math.min(k, found.shares.length);
  const lost = lostBeyond(cache, found, k);
  const scale = Math.max(found.shares[0], lost, second ? second.shares[0] : 0);
  const shownNow = Math.min(found.shares.length, state.all ? Infinity : LISTED);
  const place = Array.from(targets.ids.subarray(from, targets.start[m + 1])).indexOf(label);
  const rows = [];
  for (let i = 0; i < found.shares.length; i++) {
    if (i >= shownNow && i !== place) continue;
    const id = targets.ids[from + i];
    const drawn = cache.sampled && !targets.own[from + i];
    rows.push(
      barRow(
        scale,
        entryName(row.texts[id], i === place, drawn),
        found.shares[i],
        shareThere(id),
        `${i >= kept ? "lost" : ""} ${i === place ? "is-true" : ""}`,
        `id ${row.ids[id]}, log p ${targets.logs[from + i].toFixed(4)}`,
      ),
    );
  }
  const more = found.shares.length - shownNow;
  const rest = found.hidden + found.shares.slice(shownNow, Math.max(shownNow, kept)).reduce((a, b) => a + b, 0);
  const below = targets.count[m] - shownNow;
  if (below > 0 && !(place >= shownNow && below === 1)) {
    rows.push(
      barRow(
        scale,
        make("span", { class: "word" }, `${thousands(below)} more kept`),
        rest,
        second ? null : undefined,
        "rest",
      ),
    );
  }
  if (!cache.sampled) {
    const name = k < cache.width ? `tail, were ${k} kept` : "tail";
    rows.push(
      barRow(scale, make("span", { class: "word" }, name), k < cache.width ? lost : found.tail, undefined, "tail"),
    );
  }
  return { rows, place, lost, more, second };
}

/** The sentence on a true next token that is not among the entries. */
function outside(state, row, m, found, place) {
  if (place >= 0) return null;
  const surprise = row.targets.surprise[m];
  if (Number.isNaN(surprise))
    return make(
      "p",
      { class: "note" },
      "The true token is not among the entries shown, and the cache does not know its probability.",
    );
  const p = state.cache.sampled ? Math.exp(-surprise) : Math.exp(-surprise / state.T - found.logZ);
  return make("p", { class: "note" }, `The true token is not among the entries shown; its probability is ${share(p)}.`);
}

/** The parts of the panel. Its buttons and sliders stay in place, so that they keep the focus while they are used. */
function makePanel(panel, sliders, back, on) {
  const parts = { title: make("h2"), above: make("div"), below: make("div") };
  panel.replaceChildren(
    make("header", {}, parts.title, make("div", { class: "steps" }, back, on)),
    parts.above,
    sliders,
    parts.below,
  );
  return parts;
}

/** The tokens before one, and it. */
function contextOf(row, token) {
  const start = Math.max(0, token - CONTEXT);
  const before = Array.from(row.tokens.subarray(start, token), (id) => row.texts[id])
    .join("")
    .replace(/\n/g, " ");
  return make(
    "p",
    { class: "context", dir: directionOf([before, row.texts[row.tokens[token]]]) },
    make("span", {}, (start ? "… " : "") + before),
    make("mark", {}, alone(row.texts[row.tokens[token]])),
  );
}

/** What the tail, or the want of one, means at a position. */
function tailNote(cache, k, found, lost) {
  if (cache.sampled) {
    return (
      "Drawn entries stand for all that is not kept. A smaller sampled cache draws anew and loses nothing in the " +
      "mean, so there is no tail to grow."
    );
  }
  if (k >= cache.width) return null;
  return (
    `A cache of ${k} entries would have lost ${share(Math.max(0, lost - found.tail))} of the mass here, beside the ` +
    `tail of ${share(found.tail)}.`
  );
}

/** Fill the panel with a token of a row. */
function showPosition(state, parts, row, token, more) {
  const { cache } = state;
  const { targets } = row;
  const m = token ? row.places[token - 1] : -1;
  const where = m < 0 ? `token ${thousands(token)}` : `position ${thousands(token - 1)}`;
  parts.title.textContent = `Row ${thousands(row.index)}, ${where}`;
  if (m < 0) {
    parts.above.replaceChildren(contextOf(row, token));
    parts.below.replaceChildren(make("p", { class: "note" }, whyNone(row, token)));
    return;
  }
  const found = atTemperature(cache, targets, m, state.T);
  const listed = barsOf(state, row, m, row.tokens[token], found);
  const otherAt = row.otherPlaces ? row.otherPlaces[token - 1] : -1;
  const surprise = targets.surprise[m];
  const numbers = [
    statistic("true token", Number.isNaN(surprise) ? "unknown" : share(Math.exp(-surprise))),
    statistic("surprise", inNats(surprise), Number.isNaN(surprise) ? "" : "nats"),
    statistic("entropy", inNats(targets.entropy[m]), Number.isNaN(targets.entropy[m]) ? "" : "nats"),
  ];
  if (cache.comparing) {
    const kl = otherAt >= 0 ? row.other.kl[otherAt] : NaN;
    numbers.push(statistic("KL", inNats(kl), Number.isNaN(kl) ? "" : "nats"));
  } else {
    numbers.push(statistic("tail", cache.sampled ? "none" : share(atTemperature(cache, targets, m, 1).tail)));
  }
  parts.above.replaceChildren(contextOf(row, token), make("dl", { class: "statistics" }, ...numbers));
  const caption = cache.sampled
    ? `Weights: an unbiased estimate at T ${degrees(state.T)}`
    : `Probabilities at T ${degrees(state.T)}, ${found.exact ? "exact" : "the tail interpolated"}`;
  const columnsOf = ["token", "bar", "share"].map((name) => make("th", { scope: "col" }, name));
  const note = tailNote(cache, state.k, found, listed.lost);
  parts.below.replaceChildren(
    ...[
      listed.second &&
        make(
          "p",
          { class: "legend" },
          make("span", { class: "key own" }),
          "teacher",
          make("span", { class: "key other" }),
          cache.comparing.what === "student" ? "student" : "other cache",
        ),
      make(
        "table",
        { class: "entries" },
        make("caption", {}, caption),
        make("colgroup", {}, ...["name", "bars", "number"].map((kind) => make("col", { class: kind }))),
        make("thead", { class: "unseen" }, make("tr", {}, ...columnsOf)),
        make("tbody", {}, ...listed.rows),
      ),
      listed.more > 0 ? more : null,
      outside(state, row, m, found, listed.place),
      note && make("p", { class: "note" }, note),
    ].filter(Boolean),
  );
}

/** A position in a sentence, for who hears the page. */
function inWords(row, token) {
  const m = token ? row.places[token - 1] : -1;
  if (m < 0) return `${alone(row.texts[row.tokens[token]])}: no target`;
  const { targets } = row;
  const entries = Array.from(targets.ids.subarray(targets.start[m], targets.start[m + 1]));
  const rank = entries.indexOf(row.tokens[token]);
  const surprise = targets.surprise[m];
  return [
    `${alone(row.texts[row.tokens[token]])}:`,
    Number.isNaN(surprise) ? "probability unknown," : `probability ${share(Math.exp(-surprise))},`,
    rank < 0 ? "not among the entries," : `entry ${rank + 1} of ${entries.length},`,
    `entropy ${inNats(targets.entropy[m])};`,
    `most likely ${alone(row.texts[entries[0]])}`,
  ].join(" ");
}
