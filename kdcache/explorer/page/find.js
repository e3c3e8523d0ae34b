// Find: positions by their text, and by what the teacher said of them.

/** Mark the tokens in which a text occurs, in any case; the places [row, first token] of all matches. */
function search(rows, wanted) {
  const needle = wanted.toLowerCase();
  const found = [];
  for (const row of rows) {
    row.hits = new Set();
    if (!needle) continue;
    const starts = [];
    let text = "";
    for (const id of row.tokens) {
      starts.push(text.length);
      text += row.texts[id];
    }
    const lower = text.toLowerCase();
    const places = lower.length === text.length ? lower : text; // some letters are longer in lower case
    let token = 0;
    for (let at = places.indexOf(needle); at >= 0; at = places.indexOf(needle, at + needle.length)) {
      while (token + 1 < starts.length && starts[token + 1] <= at) token++;
      found.push([row, token]);
      for (let i = token; i < starts.length && starts[i] < at + needle.length; i++) row.hits.add(i);
    }
  }
  return found;
}

const EXTREMES = {
  surprise: { title: "most surprising", of: (row, m) => row.targets.surprise[m] },
  entropy: { title: "least sure", of: (row, m) => row.targets.entropy[m] },
  kl: {
    title: "in largest disagreement",
    of: (row, m, slot) => (row.otherPlaces[slot] < 0 ? NaN : row.other.kl[row.otherPlaces[slot]]),
  },
};

const MOST_RANKED = 1000;

/** The places [row, token] with the largest value of a kind, the largest first. */
function ranked(rows, kind) {
  const found = [];
  for (const row of rows) {
    row.places.forEach((m, slot) => {
      if (m < 0) return;
      const value = EXTREMES[kind].of(row, m, slot);
      if (!Number.isNaN(value)) found.push([value, row, slot + 1]);
    });
  }
  found.sort(([a], [b]) => b - a);
  return found.slice(0, MOST_RANKED).map(([, row, token]) => [row, token]);
}

function ordinal(number) {
  const tens = number % 100;
  const end = tens > 10 && tens < 14 ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th");
  return `${number}${end}`;
}
