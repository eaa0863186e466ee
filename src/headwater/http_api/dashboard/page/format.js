// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(value) {
  let power = 0;
  while (value >= 1024 && power < UNITS.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${value >= 100 || power === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[power]}`;
}

export const count = (value) => Math.round(value).toLocaleString("en-US");

/** 1,234 up to five digits, then 123 k and 1.2 M. */
export function short(value) {
  if (value >= 9.95e6) return `${Math.round(value / 1e6)} M`;
  if (value >= 999_500) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 99_950) return `${Math.round(value / 1e3)} k`;
  return count(value);
}

export const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : short(value));
export const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–");

export function seconds(value) {
  if (value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return "over 400 s";
  if (value < 0.1) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`;
}

/** Seconds at an axis: no zeros behind the point. */
export function axisSeconds(value) {
  if (value < 1) return value === 0 ? "0" : `${Number((1000 * value).toPrecision(2))} ms`;
  return `${Number(value.toPrecision(2))} s`;
}

export function duration(value) {
  const whole = Math.max(0, Math.round(value));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  return whole < 172_800 ? `${Math.floor(whole / 3600)} h` : `${Math.floor(whole / 86_400)} d`;
}

export const words = (name) => name.replaceAll("_", " ");
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

const BLOCKERS = {
  running: ["running request"], loading: ["loading request"], queued: ["queued request"], grammar: ["grammar"],
  offload: ["offload"], restore: ["restore"], persist: ["persist"], prefetch: ["prefetch", "prefetches"],
};

/** Blockers by name and count as a phrase: "1 running request, 2 offloads". */
export function blockers(found) {
  const parts = Object.entries(found).map(([name, number]) => plural(number, ...(BLOCKERS[name] ?? [words(name), words(name)])));
  return parts.length ? parts.join(", ") : "nothing";
}

export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");
export const namespace = (salt, key) => [salt || "no salt", key && `key ${key}`].filter(Boolean).join(", ");
