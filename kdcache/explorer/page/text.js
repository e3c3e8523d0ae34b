// Text: rows as running text, each token tinted, and one token that is chosen.
//
// A token is tinted by what the teacher said of it, one slot earlier: by the target whose true next token it is.

const TINTS = {}; // as explorer/tints.py has them; filled when the page opens

/** The value that tints position m of a row. */
function tintOf(state, row, slot) {
  const m = row.places[slot];
  if (m < 0) return NaN;
  if (state.tint === "kl") {
    const other = row.otherPlaces ? row.otherPlaces[slot] : -1;
    return other < 0 ? NaN : row.other.kl[other];
  }
  if (state.tint !== "tail") return row.targets[state.tint][m];
  return lostBeyond(state.cache, atTemperature(state.cache, row.targets, m, state.T), state.k);
}

const levelOf = (tint, value) =>
  Number.isNaN(value) ? "none" : TINTS[tint].steps.filter((step) => value >= step).length;

/** What stands before a piece: its document, and what the teacher alone read. */
function pieceHead(row, piece) {
  const told = row.told.find((each) => each.piece === piece);
  return make(
    "p",
    { class: "piece-head", role: "presentation" },
    `document ${thousands(row.documents[piece])}`,
    told ? make("span", { class: "told" }, ` · the teacher alone read “${told.text.slice(-200)}” first`) : null,
  );
}

/** The element of a row; `row.spans` are then its tokens. */
function rowElement(row) {
  const title = `row-${row.index}`;
  const text = make("div", { class: "running", role: "listbox", tabindex: "0", "aria-labelledby": title });
  row.spans = [];
  let slot = 0;
  row.pieces.forEach((length, piece) => {
    const texts = Array.from(row.tokens.subarray(slot, slot + length), (id) => row.texts[id]);
    const name = `document ${row.documents[piece]}`;
    const body = make("div", { class: "piece", role: "group", "aria-label": name, dir: directionOf(texts) });
    texts.forEach((shown, i) => {
      const label = shown.trim() ? null : alone(shown);
      const span = make("span", { role: "option", "aria-selected": "false", "aria-label": label });
      span.textContent = running(isMark.test(shown) && endsWritten(texts[i - 1] ?? "⟩") ? alone(shown) : shown);
      span.token = slot++;
      row.spans.push(span);
      body.append(span);
    });
    text.append(pieceHead(row, piece), body);
  });
  text.row = row;
  row.text = text;
  const where = `shard ${row.shard}, its row ${row.row}`;
  return make(
    "article",
    { class: "row", "aria-labelledby": title },
    make("h3", { id: title }, `Row ${thousands(row.index)}`, make("span", { class: "where" }, where)),
    text,
  );
}

/** Tint the tokens of a row anew. */
function tintRow(state, row) {
  row.spans.forEach((span, token) => {
    const level = token ? levelOf(state.tint, tintOf(state, row, token - 1)) : "none";
    span.className = row.hits?.has(token) ? `t${level} hit` : `t${level}`;
  });
}

/** Mark a token as the chosen one, or take the mark away. */
function mark(row, token, chosen) {
  const span = row.spans[token];
  span.setAttribute("aria-selected", String(chosen));
  if (chosen) {
    span.id = "chosen";
    row.text.setAttribute("aria-activedescendant", "chosen");
  } else {
    span.removeAttribute("id");
    row.text.removeAttribute("aria-activedescendant");
  }
}

/** The token nearest to one, a line above (-1) or below (1); -1 where the row ends. */
function onNextLine(row, token, direction) {
  const from = row.spans[token].getBoundingClientRect();
  const middle = (from.left + from.right) / 2;
  let line = null;
  let best = -1;
  let least = Infinity;
  for (let i = token + direction; i >= 0 && i < row.spans.length; i += direction) {
    const box = row.spans[i].getBoundingClientRect();
    const apart = direction > 0 ? box.top - from.bottom : from.top - box.bottom;
    if (apart < -from.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > from.height) break;
    const away = Math.abs((box.left + box.right) / 2 - middle);
    if (away < least) [best, least] = [i, away];
  }
  return best;
}

/** The scale of a tint, as small fields of its colours. */
function drawScale(state) {
  const { title, unit, steps, about } = TINTS[state.tint];
  const fields = [0, ...steps].map((from, level) =>
    make("span", { class: `t${level}` }, level % 2 ? "" : String(from)),
  );
  const scale = byId("scale");
  scale.setAttribute("aria-label", `${title}: ${about}; from ${steps[0]} to above ${steps.at(-1)} ${unit}`);
  scale.replaceChildren(...fields, make("span", { class: "unit" }, unit || "of the mass"));
  document.body.dataset.tint = state.tint;
}
