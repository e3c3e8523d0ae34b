// Unpack: payloads of arrays, as explorer/payload.py packs them. The steps and names are described there.

const NATS = 2048;
const RATIO = 1024;
const ENTRY = 2048;

/** Whole numbers of a payload by name: { name: Uint32Array }. */
async function unpackArrays(payload) {
  const deflated = Uint8Array.from(atob(payload.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const found = {};
  let start = 0;
  for (const [name, length, width] of payload.arrays) {
    const values = new Uint32Array(length);
    for (let plane = 0; plane < width; plane++, start += length) {
      for (let i = 0; i < length; i++) values[i] += bytes[start + i] * 256 ** plane;
    }
    found[name] = values;
  }
  return found;
}

/** Nats of each position; NaN where they are unknown. */
function nats(values, positions) {
  const known = values && values.length === positions;
  return Float64Array.from({ length: positions }, (_, m) => (known && values[m] ? (values[m] - 1) / NATS : NaN));
}

/** Numbers of either sign; `absent` where there is none. */
function ratios(values, absent) {
  return Float64Array.from(values, (value) => {
    if (!value) return absent;
    const zigzag = value - 1;
    return (zigzag % 2 ? -(zigzag + 1) / 2 : zigzag / 2) / RATIO;
  });
}

/**
 * Targets of M positions: `count`, `shown`, `entropy`, `surprise`, `kl` by position; `tails` and `hidden`, one array of
 * log ratios for each stored temperature; the entries of all positions in `ids` (places in the table of texts) and
 * `logs` (log p, or of sampled targets log weight), those of position m from `start[m]` to `start[m + 1]`.
 */
function targetsOf(arrays, temperatures) {
  const { count, shown, ids } = arrays;
  const start = new Uint32Array(count.length + 1);
  const logs = new Float64Array(ids.length);
  for (let m = 0; m < count.length; m++) {
    let sum = 0;
    for (let i = start[m]; i < start[m] + shown[m]; i++) {
      sum += arrays.nats[i];
      logs[i] = -sum / ENTRY;
    }
    start[m + 1] = start[m] + shown[m];
  }
  return {
    count,
    shown,
    ids,
    start,
    logs,
    own: arrays.own,
    entropy: nats(arrays.entropy, count.length),
    surprise: nats(arrays.surprise, count.length),
    kl: arrays.kl ? ratios(arrays.kl, NaN) : null,
    tails: temperatures.map((_, i) => arrays[`tail.${i}`] && ratios(arrays[`tail.${i}`], -Infinity)),
    hidden: temperatures.map((_, i) => ratios(arrays[`hidden.${i}`], -Infinity)),
  };
}

/** The place of the target of each slot, or -1. */
function placesOf(slots) {
  let next = 0;
  return Int32Array.from(slots, (slot) => (slot === 2 ? next++ : -1));
}

/**
 * A row that can be shown. `texts` is the table of texts that its places lead into; `temperatures` are the stored ones
 * of its targets, `second` of those that they are compared with.
 */
async function unpackRow(payload, texts, temperatures, second) {
  const own = await unpackArrays(payload.own);
  const other = payload.other && (await unpackArrays(payload.other));
  return {
    index: payload.index,
    shard: payload.shard,
    row: payload.row,
    pieces: payload.pieces,
    documents: payload.documents,
    told: payload.told,
    texts,
    tokens: own.tokens,
    slots: own.slots,
    places: placesOf(own.slots),
    targets: targetsOf(own, temperatures),
    otherPlaces: other && placesOf(other.slots),
    other: other && targetsOf(other, second),
  };
}
