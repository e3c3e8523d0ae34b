// Targets: what a stored target says at a temperature T, and what fewer entries would keep of it.
//
// With b = 1 / T, every id has p^b / Z at T. Of the entries p is stored, so their ratios are exact at any T. Of the
// tail, and of entries that are kept but not shown, only the sum S(b) of p^b at the stored T is known. Between these,
// log S is taken as linear in b. It is convex, so the tail is never shown smaller than it is. Two further ends are
// exact or bounds: S(0) is the number of ids; and for b above the largest stored, where the entries are the largest
// ids, p^b <= p^b0 q^(b - b0) with q the least entry.

function logSum(values) {
  let most = -Infinity;
  for (const value of values) most = Math.max(most, value);
  if (most === -Infinity) return most;
  let sum = 0;
  for (const value of values) sum += Math.exp(value - most);
  return most + Math.log(sum);
}

const logAdd = (a, b) => logSum([a, b]);

/** Log of the sum of p^b over the shown entries of position m. */
function shownSum(targets, m, b) {
  const from = targets.start[m];
  const end = targets.start[m + 1];
  const top = targets.logs[from] * b;
  let sum = 0;
  for (let i = from; i < end; i++) sum += Math.exp(targets.logs[i] * b - top);
  return top + Math.log(sum);
}

/** A value at b, linear between nodes [b, value] with falling b; beyond the first, with a slope. */
function between(nodes, b, slope) {
  if (b >= nodes[0][0]) return nodes[0][1] + (b - nodes[0][0]) * slope;
  const after = nodes.findIndex(([at]) => at <= b);
  const [high, low] = [nodes[after - 1], nodes[after]];
  return low[1] + ((b - low[0]) / (high[0] - low[0])) * (high[1] - low[1]);
}

/**
 * Position m of some targets at temperature T.
 *
 * Returns `shares`, the probability of each shown entry; `hidden`, that of all entries that are kept but not shown;
 * `tail`, that of everything else; `exact`, whether all of these are; and `logZ`, so that an id of log p has
 * exp(log p / T - logZ). Of sampled targets `shares` are weights, and T has no part in them.
 */
function atTemperature(cache, targets, m, T) {
  const from = targets.start[m];
  const length = targets.shown[m];
  const shares = new Float64Array(length);
  if (cache.sampled) {
    const hidden = Math.exp(targets.hidden[0][m]);
    const all = shownSum(targets, m, 1) + Math.log1p(hidden);
    for (let i = 0; i < length; i++) shares[i] = Math.exp(targets.logs[from + i]);
    return {
      shares,
      hidden: hidden ? Math.exp(all) - Math.exp(shownSum(targets, m, 1)) : 0,
      tail: 0,
      exact: true,
      logZ: NaN,
    };
  }
  const b = 1 / T;
  const seen = shownSum(targets, m, b);
  const stored = cache.temperatures.indexOf(T);
  let hidden = -Infinity;
  let tail = -Infinity;
  if (stored >= 0) {
    hidden = targets.hidden[stored][m] + seen;
    tail = targets.tails[stored][m] + logAdd(seen, hidden);
  } else {
    const slope = targets.logs[targets.start[m + 1] - 1];
    const knots = cache.order.map((i) => {
      const at = 1 / cache.temperatures[i];
      const sum = shownSum(targets, m, at);
      const rest = targets.hidden[i][m] + sum;
      return [at, rest, targets.tails[i][m] + logAdd(sum, rest)];
    });
    if (knots[0][1] > -Infinity) {
      hidden = between([...knots.map(([at, rest]) => [at, rest]), [0, Math.log(targets.count[m] - length)]], b, slope);
    }
    if (knots[0][2] > -Infinity) {
      const others = Math.log(Math.max(1, cache.vocabulary - targets.count[m]));
      tail = between([...knots.map(([at, , rest]) => [at, rest]), [0, others]], b, slope);
    }
  }
  const logZ = logSum([seen, hidden, tail]);
  for (let i = 0; i < length; i++) shares[i] = Math.exp(targets.logs[from + i] * b - logZ);
  const exact = stored >= 0 || (hidden === -Infinity && tail === -Infinity);
  return { shares, hidden: Math.exp(hidden - logZ), tail: Math.exp(tail - logZ), exact, logZ };
}

/** The mass that a cache of k entries would not keep of a position; of the cache's own width, its tail. */
function lostBeyond(cache, found, k) {
  if (k >= cache.width) return found.tail;
  let sum = found.tail + found.hidden;
  for (let i = found.shares.length - 1; i >= k; i--) sum += found.shares[i];
  return sum;
}

/** Mean mass that k entries keep, for k from 1 to the width that is shown, over rows. */
function keptByEntries(cache, rows, T) {
  const sums = new Float64Array(cache.top + 1);
  let positions = 0;
  for (const row of rows) {
    const { targets } = row;
    for (let m = 0; m < targets.count.length; m++) {
      const { shares } = atTemperature(cache, targets, m, T);
      let sum = 0;
      for (let k = 1; k <= cache.top; k++) {
        if (k <= shares.length) sum += shares[k - 1];
        sums[k] += sum;
      }
      positions++;
    }
  }
  return Array.from(sums, (sum) => sum / Math.max(1, positions)).slice(1);
}
