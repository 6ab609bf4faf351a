// The page of the labelling queue. It asks only the server that it came from, and keeps nothing but the window's name and band.

const $ = (id) => document.getElementById(id);
const WORDS = { 1: "anomaly", 0: "normal", [-1]: "unsure" };
const HOW = { band: "in the band", similar: "as similar", random: "by chance", spot: "spot check" };
const secret = document.querySelector("meta[name=page]").content;

let about, view;
let busy = false, changed = false, seen = false;
let zoom = 1;
let band;

if (location.search) history.replaceState(null, "", "/"); // the token is in a cookie by now
let name = sessionStorage.getItem("window");
if (!name) {
  name = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  sessionStorage.setItem("window", name);
}

const mode = () => document.querySelector("input[name=mode]:checked").value;
const score = (value) => value.toFixed(value < 0.1 ? 3 : 2);
const percent = (part) => `${(100 * part).toFixed(part < 0.1 ? 1 : 0)} %`;
const rate = ({ found, looked }) => (looked ? percent(found / looked) : "–");
const toPlace = (value) => Math.round(1000 * Math.sqrt(value)); // the slider's scale: the square root of the score
const toScore = (place) => (place / 1000) ** 2;

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Asks the server and shows its answer. While it has not answered, nothing else is asked: nobody labels an image unseen.
async function ask(what, more = {}, say = () => "") {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(`/${what}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Hanse-Page": secret },
      body: JSON.stringify({ window: name, mode: mode(), band, ...more }),
    });
    if (answer.status !== 200 && answer.status !== 409) throw new Error(await answer.text());
    view = await answer.json();
    await show(view.problem ? "" : say());
  } catch (error) {
    $("problem").textContent = `Nothing was saved: ${error.message}. Is the queue still running? If not, start it and open its new address.`;
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
    if (changed) { changed = false; ask("next"); }
  }
}

function look() {
  if (busy) changed = true;
  else ask("next");
}

const give = (label) => {
  if (!view?.image || busy || (!seen && label >= 0)) return;
  const { file } = view.image;
  ask("label", { file, label }, () => `${file}: ${WORDS[label]}.${label === 1 && about.likeness && mode() !== "similar" ? " F finds similar ones." : ""}`);
};
const undo = (file) => {
  if (file || view?.mine) ask("undo", file ? { file } : {}, () => `Label taken back: ${view.image?.file ?? ""}.`);
};
const similar = () => {
  const radio = document.querySelector(`input[value=${mode() === "similar" ? "band" : "similar"}]`);
  if (!radio.disabled) { radio.checked = true; look(); }
};
const enlarge = () => {
  zoom = zoom === 4 ? 1 : zoom * 2;
  $("picture").className = `x${zoom}`;
  $("zoomed").textContent = `${zoom}×`;
  const stage = $("stage");
  stage.scrollTo((stage.scrollWidth - stage.clientWidth) / 2, (stage.scrollHeight - stage.clientHeight) / 2);
};

async function show(said) {
  const { image, yields, recent, problem } = view;
  $("problem").textContent = problem;
  await showImage(image);
  for (const id of ["anomaly", "normal"]) $(id).disabled = !seen;
  $("unsure").disabled = !image;
  $("undo").disabled = !view.mine;
  showYield(yields);
  const where = { band: "in this band labelled", similar: "of all images labelled", spot: "spot checks in 7 days" }[mode()];
  $("progress-text").textContent = `${view.done.toLocaleString("en")} of ${view.of.toLocaleString("en")} ${where}`;
  $("progress").max = view.of || 1;
  $("progress").value = view.done;
  $("recent").replaceChildren(...recent.map(([label, at]) => {
    const item = document.createElement("li");
    const button = element("button", "", { type: "button", class: `l${label.label}`, "aria-label": `Take back ${label.file}: ${WORDS[label.label]}`, title: `${label.file}: take back` });
    if (about.pictures) button.append(element("img", "", { src: `/picture/${at}`, alt: "" }));
    button.append(WORDS[label.label]);
    button.addEventListener("click", () => undo(label.file));
    item.append(button);
    return item;
  }));
  $("said").textContent = [said, image ? `Now ${image.file}, score ${score(image.score)}.` : ""].join(" ");
}

async function showImage(image) {
  seen = Boolean(image);
  const picture = $("picture"), isPicture = Boolean(image) && about.pictures;
  picture.hidden = !isPicture;
  $("row").hidden = !image || isPicture;
  $("empty").hidden = Boolean(image);
  $("facts").replaceChildren();
  if (!image) {
    $("empty").textContent = nothingLeft();
    return;
  }
  const facts = { score: score(image.score), ...(isPicture ? image.columns : {}), "came up": HOW[image.how], file: image.file };
  for (const [key, value] of Object.entries(facts)) {
    const chip = element("span", `${key} `);
    chip.append(element("b", value));
    $("facts").append(chip);
  }
  if (isPicture) {
    picture.src = `/picture/${image.at}`;
    picture.alt = `${image.file}, score ${score(image.score)}`;
    try {
      await picture.decode();
    } catch {
      seen = false;
      $("problem").textContent = "This image cannot be shown: skip it.";
    }
  } else {
    $("row").replaceChildren(...Object.entries(image.columns).flatMap(([key, value]) => [element("dt", key), element("dd", value)]));
  }
}

function nothingLeft() {
  const anomalies = Object.values(view.yields.how).some((tally) => tally.found);
  if (mode() === "similar" && !anomalies) return "Label an anomaly first: then this finds images that are like it.";
  if (mode() === "band") return "Every image in this band is labelled. Move the handles apart, or find similar ones.";
  return "Every image is labelled.";
}

function showYield(yields) {
  const { search, chance } = yields;
  $("found").textContent = search.found;
  $("looked").textContent = search.looked;
  $("rate").textContent = rate(search);
  const enough = chance.looked >= 20; // before that, the mean score is the better guess
  const part = enough ? chance.found / chance.looked : yields.expected;
  const from = enough
    ? `${rate(chance)}, ${chance.found} of ${chance.looked} drawn by lot, 95 % interval ${percent(yields.low)} to ${percent(yields.high)}`
    : `${percent(part)} by the mean score; ${chance.looked} drawn by lot so far`;
  $("chance").textContent = `By chance so many images would have brought about ${(part * search.looked).toFixed(1)} (${from}).`;
  const row = (head, tally, now) => {
    const made = element("tr", "", now ? { class: "now" } : {});
    made.append(...[head, tally.looked, tally.found, rate(tally)].map((text) => element("td", text)));
    return made;
  };
  $("by-band").replaceChildren(...yields.bands.map(([low, high, tally]) => row(`${low} – ${high}`, tally, low < band[1] && high > band[0])));
  $("by-how").replaceChildren(...Object.entries(yields.how).map(([how, tally]) => row(HOW[how], tally, view.image?.how === how)));
}

function showBand() {
  for (const [id, value] of [["low", band[0]], ["high", band[1]]]) {
    $(id).value = toPlace(value);
    $(id).setAttribute("aria-valuetext", score(value));
  }
  $("low").style.zIndex = band[0] > 0.5 ? 1 : 0; // so that neither handle hides the other at an end
  $("band-text").textContent = `${score(band[0])} to ${score(band[1])}`;
  const bars = about.bars.length;
  [...$("bars").children].forEach((bar, i) => bar.classList.toggle("in", toScore((1000 * (i + 1)) / bars) > band[0] && toScore((1000 * i) / bars) < band[1]));
}

function move(id) {
  const at = id === "low" ? 0 : 1;
  const other = toPlace(band[1 - at]);
  const place = at === 0 ? Math.min($(id).valueAsNumber, other - 1) : Math.max($(id).valueAsNumber, other + 1);
  band[at] = toScore(place);
  sessionStorage.setItem("band", JSON.stringify(band));
  showBand();
}

function drawBars() {
  const most = Math.log1p(Math.max(...about.bars, 1)), width = 500 / about.bars.length;
  $("bars").replaceChildren(...about.bars.map((count, i) => {
    const height = (58 * Math.log1p(count)) / most, bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ x: i * width + 0.5, width: width - 1, y: 60 - height, height })) bar.setAttribute(key, value);
    return bar;
  }));
}

const KEYS = { 1: () => give(1), 0: () => give(0), s: () => give(-1), u: () => undo(), f: similar, z: enlarge };
const ARROWS = { ArrowRight: () => give(1), ArrowLeft: () => give(0), ArrowDown: () => give(-1), ArrowUp: () => undo() };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const arrowsTaken = event.target.closest("input") || (event.target.id === "stage" && zoom > 1); // they move a handle, a choice, the picture
  const act = KEYS[event.key.toLowerCase()] ?? (arrowsTaken ? undefined : ARROWS[event.key]);
  if (!act) return;
  event.preventDefault();
  act();
});
for (const [id, act] of Object.entries({ anomaly: () => give(1), normal: () => give(0), unsure: () => give(-1), undo: () => undo(), zoom: enlarge })) {
  $(id).addEventListener("click", act);
}
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", look);
for (const id of ["low", "high"]) {
  $(id).addEventListener("input", () => move(id));
  $(id).addEventListener("change", look);
}
$("modes").addEventListener("click", (event) => { if (event.detail) document.activeElement.blur(); }); // after a mouse, arrows label again

about = await (await fetch("/about")).json();
band = JSON.parse(sessionStorage.getItem("band")) ?? about.band;
document.title = `Labelling ${about.title}`;
$("title").textContent = about.title;
$("who").textContent = `${about.images.toLocaleString("en")} images, labelled by ${about.by}.`;
document.querySelector("input[value=similar]").disabled = !about.likeness;
drawBars();
showBand();
ask("next");
