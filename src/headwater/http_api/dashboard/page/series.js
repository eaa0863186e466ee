// The samples of the last hour, and what can be said of a range of them. Counts grow since the start of an engine; a
// count that falls belongs to an engine that was started again.

const KEEP_MS = 3_660_000;
const DENSE_MS = 330_000;
const GAP_MS = 25_000; // between thin samples lie 10 s

export class Series {
  constructor() {
    this.samples = [];
  }

  /** `columns`: each series as its first value and steps; -1 stands for no value. */
  load(columns) {
    const length = columns.t?.length ?? 0;
    this.samples = Array.from({ length }, () => ({}));
    for (const [name, steps] of Object.entries(columns)) {
      let value = 0;
      steps.forEach((step, index) => {
        value += step;
        if (value >= 0) this.samples[index][name] = value;
      });
    }
  }

  push(sample) {
    if (this.samples.length && sample.t <= this.samples.at(-1).t) return;
    this.samples.push({ ...sample });
    const now = sample.t;
    let last = -Infinity;
    this.samples = this.samples.filter(({ t }) => {
      if (t < now - KEEP_MS) return false;
      if (t < now - DENSE_MS && t - last < 10_000) return false;
      last = t;
      return true;
    });
  }

  get last() {
    return this.samples.at(-1);
  }

  /** The samples of the last `rangeS` seconds, with one more before them to take differences from. */
  window(rangeS) {
    const from = (this.last?.t ?? 0) - 1000 * rangeS;
    const index = this.samples.findIndex(({ t }) => t >= from);
    return index < 0 ? [] : this.samples.slice(index);
  }

  /** How much a count has grown in the range. */
  growth(name, rangeS) {
    const found = this.window(rangeS);
    let sum = 0;
    for (let i = 1; i < found.length; i += 1) sum += step(found[i - 1], found[i], name);
    return sum;
  }

  perSecond(name, rangeS) {
    const found = this.window(rangeS);
    return found.length < 2 ? 0 : (1000 * this.growth(name, rangeS)) / (found.at(-1).t - found[0].t);
  }

  /** Points [t, value] of a gauge; null where nobody looked. */
  gauge(name, rangeS) {
    return withGaps(this.window(rangeS), (sample) => sample[name] ?? 0);
  }

  /** Points [t, value] of a count's growth per second, averaged over some samples if there are many. */
  rates(name, rangeS) {
    return this.#between(rangeS, 2, (before, now) => (1000 * step(before, now, name)) / (now.t - before.t));
  }

  /** The growth of each bucket of a histogram; not yet cumulative ones become so. */
  #buckets(kind, before, now, number) {
    return Array.from({ length: number }, (_, i) => step(before, now, `${kind}.${i}`));
  }

  /** A quantile of a histogram in the range, as Prometheus' histogram_quantile has it; NaN without observations. */
  quantile(kind, q, rangeS, bounds) {
    const found = this.window(rangeS);
    if (found.length < 2) return NaN;
    const sums = new Array(bounds.length + 1).fill(0);
    for (let i = 1; i < found.length; i += 1) {
      this.#buckets(kind, found[i - 1], found[i], sums.length).forEach((n, index) => { sums[index] += n; });
    }
    return quantileOf(sums, q, bounds);
  }

  quantiles(kind, q, rangeS, bounds) {
    return this.#between(rangeS, 10, (before, now) => {
      const value = quantileOf(this.#buckets(kind, before, now, bounds.length + 1), q, bounds);
      return Number.isFinite(value) ? value : null;
    });
  }

  ratio(over, under, rangeS) {
    return this.#between(rangeS, 10, (before, now) => {
      const whole = step(before, now, under);
      return whole > 0 ? over.reduce((sum, name) => sum + step(before, now, name), 0) / whole : null;
    });
  }

  /** Values of growth over some samples each (`least` or more), at 90 moments or fewer. */
  #between(rangeS, least, value) {
    const found = this.window(rangeS);
    const stride = Math.max(1, Math.round(found.length / 90));
    const width = Math.max(stride, least);
    const points = [];
    for (let i = stride; i < found.length; i += stride) {
      const [before, now] = [found[Math.max(0, i - width)], found[i]];
      if (now.t - before.t > GAP_MS + 1000 * width) points.push([now.t, null]);
      else points.push([now.t, value(before, now)]);
    }
    return points;
  }
}

function step(before, now, name) {
  const growth = (now[name] ?? 0) - (before[name] ?? 0);
  return growth >= 0 ? growth : now[name] ?? 0;
}

function withGaps(samples, value) {
  const points = [];
  samples.forEach((sample, i) => {
    if (i && sample.t - samples[i - 1].t > GAP_MS) points.push([sample.t - 1, null]);
    points.push([sample.t, value(sample)]);
  });
  return points;
}

/** `counts` are cumulative, one for each bound and one for infinity. */
export function quantileOf(counts, q, bounds) {
  const total = counts.at(-1);
  if (!total) return NaN;
  const rank = q * total;
  const index = counts.findIndex((n) => n >= rank);
  if (index >= bounds.length) return Infinity;
  const [low, below] = index ? [bounds[index - 1], counts[index - 1]] : [0, 0];
  return low + ((bounds[index] - low) * (rank - below)) / Math.max(1e-9, counts[index] - below);
}
