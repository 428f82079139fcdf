// What the search page does: asks while one types, shows the answer to the last question only.
// Whatever comes from the server becomes text, never markup.
"use strict";

const WAIT_MS = 120; // after the last letter, before the documents are searched; titles are asked at once
const N_RESULTS = 10;
const N_TITLES = 8;
const NO_ANSWER = "The search does not answer. It may be starting again; it is asked anew when you type.";

const part = (id) => document.getElementById(id);
const query = part("query");
const results = part("results");
const items = part("items");
const titles = part("titles");

// ---- asking -------------------------------------------------------------------------------------------------

/** Asks one address; a newer question through the same asker makes the older one's answer disappear. */
function asker() {
  let latest = 0;
  let running = null;
  return {
    async ask(path, body) {
      running?.abort();
      running = new AbortController();
      const mine = ++latest;
      try {
        const answer = await fetched(path, body, running.signal);
        return mine === latest ? answer : null;
      } catch (error) {
        if (mine !== latest || error.name === "AbortError") return null;
        throw error;
      }
    },
    forget() {
      latest += 1;
      running?.abort();
    },
  };
}

async function fetched(path, body, signal) {
  const request = { signal, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    request.method = "POST";
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(NO_ANSWER);
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (response.ok && answer !== null) return answer;
  throw new Error(typeof answer?.error === "string" ? answer.error : NO_ANSWER);
}

const documentsAsker = asker();
const titlesAsker = asker();
let timer = 0;
const NOTHING = { query: "", version: null, results: [], items: [] };
let shown = NOTHING; // the last answer to a search
let isRelated = false;

function typed() {
  clearTimeout(timer);
  if (!query.value.trim()) {
    clearAnswers();
    return;
  }
  askTitles(query.value);
  timer = setTimeout(search, WAIT_MS);
}

async function askTitles(text) {
  try {
    const asked = new URLSearchParams({ q: text, k: N_TITLES, ...readerField() });
    const answer = await titlesAsker.ask(`/suggest?${asked}`);
    if (answer) showTitles(answer.results ?? [], answer.version);
  } catch {
    showTitles([], null); // the search beside it says what is wrong
  }
}

async function search() {
  clearTimeout(timer);
  const text = query.value.trim();
  if (!text) return;
  const hybrid = part("hybrid").checked && !part("hybrid-control").hidden;
  const body = { query: text, k: N_RESULTS, hybrid, ...readerField() };
  const filter = {};
  if (part("language").value) filter.language = part("language").value;
  if (Number(part("least").value) > 0) filter.minimum_score = Number(part("least").value);
  if (Object.keys(filter).length) body.filter = filter;
  await answered("/search", body, (answer) => {
    shown = { query: text, version: answer.version, results: answer.results, items: answer.items ?? [] };
    showFound();
    showTook(answer.took_ms);
    if (!areChoicesKnown) offerChoices();
  });
}

async function relatedTo(result) {
  clearTimeout(timer);
  const body = { document_ids: [result.document_id], k: N_RESULTS, ...readerField() };
  await answered("/related", body, (answer) => {
    showResults(answer.results, `Related to “${nameOf(result)}”`, true, () => ({ version: answer.version }));
    showTook(answer.took_ms);
    part("back").focus();
  });
}

async function answered(path, body, show) {
  isBusy(true);
  try {
    const answer = await documentsAsker.ask(path, body);
    if (!answer) return; // a newer question is under way, and keeps the progress line
    showError("");
    show(answer);
  } catch (error) {
    showError(error.message);
  }
  isBusy(false);
}

// ---- showing ------------------------------------------------------------------------------------------------

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const nameOf = (document) => document.title || document.document_id;

/** An address that may be followed, whole or from "/" on, or null: a document may say "javascript:" or anything. */
function addressOf(text) {
  if (typeof text !== "string" || !/^(https?:|\/)/i.test(text)) return null;
  try {
    return new URL(text, location.origin);
  } catch {
    return null;
  }
}

/** A link where the document has an address, else a button. */
function opener(document, className, url) {
  const element = made(url ? "a" : "button", className);
  element.append(made("span", "", nameOf(document)));
  element.dir = "auto";
  if (url) {
    element.href = url.href;
    element.rel = "noreferrer";
  } else {
    element.type = "button";
  }
  return element;
}

function showTitles(found, version) {
  const rows = found.map((document) => {
    const row = made("li");
    const url = addressOf(document.url);
    const element = opener(document, "title stop", url);
    element.title = nameOf(document);
    element.addEventListener("click", () => {
      if (url) return opened(document, { version });
      query.value = nameOf(document);
      query.focus();
      typed();
    });
    row.append(element);
    return row;
  });
  titles.replaceChildren(...rows);
  part("titles-part").hidden = !query.value.trim();
  part("no-titles").hidden = found.length > 0;
}

/** What the last search found: canned answers first. */
function showFound() {
  const { query, version } = shown;
  showResults(shown.results, "Results", false, (rank) => ({ version, query, rank: rank + 1 }));
  showItems(shown.items);
}

function showTook(ms) {
  part("took").textContent = Number.isFinite(ms) ? `${Math.max(1, Math.round(ms))} ms` : "";
}

/** Documents under a heading; `foundBy` says of each place what to log when its document is opened. */
function showResults(found, heading, related, foundBy) {
  isRelated = related;
  showItems([]);
  showTook(null);
  results.replaceChildren(...found.map((result, rank) => shownResult(result, foundBy(rank))));
  part("results-heading").textContent = heading;
  part("back").hidden = !related;
  part("results-part").hidden = false;
  part("empty").hidden = found.length > 0;
  if (!found.length) {
    part("empty").textContent = related
      ? "Nothing is related to it."
      : "Nothing found. Try other words, any language, or a lower least score.";
  }
  part("said").textContent = saying(found.length, related);
  for (const document of found) offerLanguage(document.language);
}

function saying(count, related) {
  const what = related ? "related document" : "result";
  return count === 0 ? `No ${what}s` : count === 1 ? `1 ${what}` : `${count} ${what}s`;
}

function showItems(found) {
  items.hidden = found.length === 0;
  items.replaceChildren(...found.map(shownItem));
  if (found.length) part("said").prepend(found.length === 1 ? "1 answer. " : `${found.length} answers. `);
}

function shownItem(item) {
  const url = addressOf(item.path);
  const row = made("li", "item");
  const name = url ? opener({ title: item.phrase }, "open stop", url) : made("span", "", item.phrase);
  const place = made("span", "place", item.path);
  name.dir = place.dir = "auto";
  row.append(name, place);
  return row;
}

function shownResult(result, foundBy) {
  const url = addressOf(result.url);
  const row = made("li");
  const card = made("article", "result");
  const heading = made("h3");
  const open = opener(result, "open stop", url);
  heading.append(open);
  card.append(heading);
  if (url) card.append(made("span", "place", url.host + (url.pathname === "/" ? "" : decoded(url.pathname))));
  const text = made("p", "text", result.text ?? "");
  text.dir = "auto";
  card.append(text, footOf(result));
  open.addEventListener("click", () => {
    const isOpen = Boolean(url) || card.classList.toggle("whole");
    if (!url) open.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) opened(result, foundBy);
  });
  if (!url) open.setAttribute("aria-expanded", "false");
  row.append(card);
  return row;
}

function decoded(path) {
  try {
    return decodeURI(path);
  } catch {
    return path;
  }
}

function footOf(result) {
  const foot = made("div", "foot");
  const why = result.why ?? {};
  const score = Number.isFinite(why.dense) ? why.dense : why.lexical == null ? result.score : null;
  if (Number.isFinite(score)) foot.append(scoreOf(score));
  if (why.fresh === true) foot.append(made("span", "fresh", "new"));
  const reasons = reasonsOf(why);
  if (reasons) foot.append(made("span", "why", reasons));
  const related = made("button", "related quiet", "Related");
  related.type = "button";
  related.setAttribute("aria-label", `Related to ${nameOf(result)}`);
  related.addEventListener("click", () => relatedTo(result));
  foot.append(related);
  return foot;
}

function scoreOf(score) {
  const element = made("span", "score");
  const bar = made("span", "bar");
  const filled = made("span");
  filled.style.setProperty("--share", String(Math.min(1, Math.max(0, score))));
  bar.setAttribute("aria-hidden", "true");
  bar.append(filled);
  element.append(bar, made("span", "unseen", "Score "), made("span", "", score.toFixed(2)));
  return element;
}

function reasonsOf(why) {
  const reasons = [];
  if (Number.isFinite(why.dense_rank) && Number.isFinite(why.lexical_rank)) {
    reasons.push(`by meaning no. ${why.dense_rank}, by words no. ${why.lexical_rank}`);
  } else if (Number.isFinite(why.lexical_rank)) {
    reasons.push(`by words no. ${why.lexical_rank}`);
  }
  const together = Array.isArray(why.sessions) ? why.sessions : [];
  if (together.length) {
    const others = together.length > 1 ? ` and ${together.length - 1} more of these` : "";
    reasons.push(`read in one session with “${nameOf(together[0])}”${others}`);
  }
  return reasons.join(" · ");
}

function showError(message) {
  part("error").hidden = !message;
  part("error").textContent = message;
}

function isBusy(busy) {
  part("progress").hidden = !busy;
  results.setAttribute("aria-busy", String(busy));
}

function clearAnswers() {
  documentsAsker.forget();
  titlesAsker.forget();
  shown = NOTHING;
  isRelated = false;
  showItems([]);
  results.replaceChildren();
  titles.replaceChildren();
  part("results-part").hidden = true;
  part("titles-part").hidden = true;
  part("empty").hidden = false;
  part("empty").textContent = "Write what you remember: a few words, a question, the beginning of a title.";
  part("said").textContent = "";
  showError("");
  isBusy(false);
}

// ---- what the reader allows, and chooses --------------------------------------------------------------------

/** Storage may be switched off; then nothing is remembered, and all else works. */
const kept = {
  get(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value === null) localStorage.removeItem(name);
      else localStorage.setItem(name, value);
    } catch {
      // as above
    }
  },
};

function reader() {
  return part("remember").checked ? kept.get("reader") : null;
}

function remember() {
  const numbers = crypto.getRandomValues(new Uint8Array(16));
  const id = Array.from(numbers, (number) => number.toString(16).padStart(2, "0")).join("");
  kept.set("reader", part("remember").checked ? id : null);
}

const readerField = () => (reader() ? { user_id: reader() } : {});

/** Logs an open: `foundBy` is the version that showed it, and the query and rank where a search did. */
function opened(document, foundBy) {
  if (!reader()) return;
  const body = { document_id: document.document_id, ...foundBy, ...readerField() };
  const headers = { "Content-Type": "application/json" };
  // keepalive: it is sent although the page is being left
  fetch("/opened", { method: "POST", keepalive: true, headers, body: JSON.stringify(body) }).catch(() => {});
}

const offered = new Set();
function offerLanguage(code) {
  if (typeof code !== "string" || !code || offered.has(code)) return;
  offered.add(code);
  let name = code;
  try {
    name = new Intl.DisplayNames(undefined, { type: "language" }).of(code) ?? code;
  } catch {
    // not a language tag: shown as it is
  }
  const option = made("option", "", name);
  option.value = code;
  part("language").append(option);
}

let areChoicesKnown = false;

/** The languages that the served version has, and whether it knows words: nothing to choose is not shown. */
async function offerChoices() {
  try {
    const response = await fetch("/health");
    if (!response.ok) return; // asked again with the first answer; until then the search says what is wrong
    const health = await response.json();
    const languages = Array.isArray(health.languages) ? health.languages : [];
    languages.forEach(offerLanguage);
    part("language-control").hidden = languages.length === 0;
    part("hybrid-control").hidden = health.hybrid === false;
    areChoicesKnown = true;
  } catch {
    // as above
  }
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ?? (prefersDark.matches ? "dark" : "light");
}

function showTheme() {
  part("theme").setAttribute("aria-pressed", String(theme() === "dark"));
}

function switchTheme() {
  const next = theme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  kept.set("theme", next);
  showTheme();
}

// ---- keyboard -----------------------------------------------------------------------------------------------

function move(step) {
  const stops = [query, ...document.querySelectorAll(".stop")].filter((stop) => stop.checkVisibility());
  const at = stops.indexOf(document.activeElement);
  const within = document.activeElement.closest?.(".result")?.querySelector(".stop");
  const from = at >= 0 ? at : within ? stops.indexOf(within) : 0;
  const to = stops[Math.min(stops.length - 1, Math.max(0, from + step))];
  to.focus();
  to.scrollIntoView({ block: "nearest" });
}

function back() {
  documentsAsker.forget(); // another document's related ones may be under way
  isBusy(false);
  showFound();
  query.focus();
}

function pressed(event) {
  if (event.isComposing || event.keyCode === 229) return; // the input method's own key
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const isControl = target !== query && target.matches("input, select, textarea");
  if (event.key === "/" && target !== query && !target.matches("select, textarea")) {
    query.focus();
    query.select();
  } else if (event.key === "Escape" && isRelated && !isControl) {
    back();
  } else if (event.key === "Escape" && !isControl) {
    query.value = "";
    clearTimeout(timer);
    clearAnswers();
    query.focus();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !isControl) {
    move(event.key === "ArrowDown" ? 1 : -1);
  } else {
    return;
  }
  event.preventDefault();
}

// ---- start --------------------------------------------------------------------------------------------------

query.addEventListener("input", typed); // also for every step of an input method's composition
part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
part("language").addEventListener("change", search);
part("hybrid").addEventListener("change", search);
part("least").addEventListener("input", () => {
  const least = Number(part("least").value);
  part("least-shown").textContent = least ? least.toFixed(2) : "any";
  clearTimeout(timer);
  timer = setTimeout(search, WAIT_MS);
});
part("back").addEventListener("click", back);
part("remember").addEventListener("change", remember);
part("theme").addEventListener("click", switchTheme);
prefersDark.addEventListener("change", showTheme);
document.addEventListener("keydown", pressed);

if (["light", "dark"].includes(kept.get("theme"))) document.documentElement.dataset.theme = kept.get("theme");
part("remember").checked = kept.get("reader") !== null;
showTheme();
offerChoices();
if (query.value.trim()) typed(); // the browser may have kept what was typed
