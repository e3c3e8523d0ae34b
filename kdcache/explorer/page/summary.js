// Summary: the whole cache in words, and distributions as charts.

const mean = (value, unit) => (value === null ? "unknown" : `${share(value)}${unit}`);

function settings(selection) {
  const { kind, ...others } = selection;
  return [kind, ...Object.entries(others).map(([name, value]) => `${name} ${value}`)].join(", ");
}

/** What is said of the cache: pairs of a name and a text. */
function facts(head) {
  const { summary: s } = head;
  const { least, most } = s.entries_per_position;
  const shards = `${thousands(s.shards.committed)} of ${thousands(s.shards.planned)} shards`;
  const part = s.shard === null ? "" : `, shard ${s.shard}`;
  return [
    ["Cache", `${s.cache}${part} (${s.complete ? "complete" : `incomplete: ${shards}`})`],
    ["Teacher", String(s.teacher ?? "unknown")],
    ["Corpus", String(s.corpus ?? "unknown")],
    ["Selection", `${settings(s.selection)}; T ${s.temperatures.map(degrees).join(", ")}; precision ${s.precision}`],
    ["Rows", `${thousands(s.rows)} of ${thousands(s.seq_len)} slots, ${thousands(s.tokens)} tokens`],
    ["Positions", `${thousands(s.positions)} of ${thousands(s.labels)} labels`],
    ["Entries", `${thousands(s.entries)}, ${least === most ? least : `${least} to ${most}`} a position`],
    ["Bytes", `${thousands(s.bytes)}, ${s.bytes_per_position.toFixed(1)} a position`],
    [
      "Kept mass",
      s.mean_kept_mass === null
        ? "all in the mean: the entries are an unbiased sample"
        : `${s.mean_kept_mass.toFixed(6)} in the mean, tail ${share(s.mean_tail)}`,
    ],
    ["Entropy", mean(s.mean_entropy, " nats in the mean")],
    ["Teacher's nll", mean(s.teacher_nll, " nats in the mean")],
    ["Vocabulary", `${thousands(s.vocab_size)} ids`],
    ...(s.known.tail_sum === "remainder" ? [["Tails", "one minus the kept mass: below 1e−7 they are noise"]] : []),
    ...(head.compare ? [["Compared with", `${head.compare.name} (KL: ${head.compare.kl_kind})`]] : []),
  ];
}

/** The histogram of entropies of a cache, whose bins are even in the root of H, in even bins of H. */
function entropyChart(histogram) {
  if (!histogram || !histogram.length) return columns("Entropy", [], ["0", ""], "The cache does not know it.");
  const edge = (i) => (i / 32) ** 2;
  const most = edge(histogram.length);
  const counts = new Array(40).fill(0);
  histogram.forEach((count, i) => {
    const [low, high] = [edge(i), edge(i + 1)];
    const [first, last] = [(low / most) * 40, (high / most) * 40];
    for (let bin = Math.floor(first); bin < Math.min(40, last); bin++) {
      counts[bin] += (count * (Math.min(last, bin + 1) - Math.max(first, bin))) / (last - first);
    }
  });
  return columns("Entropy", counts, ["0", `${most.toFixed(1)} nats`], "of all labelled positions of the cache");
}

/** Documents: how many were used, and why others were not. */
function documentsChart(s) {
  const dropped = Object.entries(s.dropped);
  const left = dropped.reduce((sum, [, count]) => sum + count, 0);
  const shown = bars(
    "Documents",
    [["used", s.documents - left], ...dropped.map(([reason, count]) => [`left out: ${reason}`, count])],
    thousands,
    `${thousands(s.documents)} in all; ${thousands(s.cut)} cut into pieces, ${thousands(s.truncated)} truncated`,
  );
  if (s.bad_records.length) {
    shown.append(
      make(
        "ul",
        { class: "bad" },
        ...s.bad_records.map((bad) => make("li", {}, `document ${thousands(bad.document)}: ${bad.reason}`)),
      ),
    );
  }
  return shown;
}

/** Fill the summary; the charts are of the rows that the page has. */
function showSummary(state) {
  const { cache, rows } = state;
  const head = cache.head;
  const here = `over the ${thousands(rows.length)} rows on this page`;
  const all = (name) => rows.flatMap((row) => Array.from(row.targets[name]));
  const charts = [entropyChart(head.summary.entropy_histogram)];
  if (cache.sampled) {
    charts.push(
      figure(
        "Kept mass",
        "The entries are an unbiased sample of the whole distribution: nothing is lost in the mean.",
        null,
      ),
    );
  } else {
    const kept = keptByEntries(cache, rows, state.T);
    charts.push(
      curve("Kept mass by entries", kept, state.k, `mean at T ${degrees(state.T)}, ${here}`),
      histogram(
        "Tail",
        rows.flatMap((row) =>
          Array.from(row.targets.count, (_, m) => atTemperature(cache, row.targets, m, state.T).tail),
        ),
        "",
        `mass that the cache does not keep at T ${degrees(state.T)}, ${here}`,
      ),
    );
  }
  charts.push(
    histogram("Surprise", all("surprise"), "nats", `of the true next tokens, ${here}`),
    histogram("Entries a position", all("count"), "", here, 33),
    bars(
      "Bytes by stream",
      Object.entries(head.summary.streams),
      (bytes) => bytes.toFixed(1),
      "bytes a position, each stream compressed by itself",
    ),
    documentsChart(head.summary),
  );
  if (cache.comparing) {
    charts.push(
      histogram(
        "KL",
        rows.flatMap((row) => Array.from(row.other.kl)),
        "nats",
        `to ${cache.comparing.name}, ${here}`,
      ),
    );
  }
  byId("summary").replaceChildren(
    make("h2", {}, "Summary"),
    make(
      "dl",
      { class: "facts" },
      ...facts(head).map(([name, value]) =>
        make("div", {}, make("dt", {}, name), make("dd", {}, make("bdi", {}, value))),
      ),
    ),
    make("div", { class: "charts" }, ...charts),
  );
}
