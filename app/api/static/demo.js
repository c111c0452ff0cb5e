// The demo page: a photo goes to POST /v1/pose as a body of its own, and what comes back is drawn over it.
// Boxes that are dragged on the photo are sent with it; without any the service finds the people.

import { follow } from "./camera.js";

const part = (id) => document.getElementById(id);
const canvas = part("canvas");
const LONGEST = 1600; // of the canvas, in its own pixels
const TYPES = ["image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff"]; // that the service takes by name
const LEFT = "#328cff", RIGHT = "#ff821e", MIDDLE = "#50c850"; // the person's, as in the pictures that the service draws

let photo = null; // the file
let upright = null; // the photo as it is shown: a picture, LONGEST at most, and the photo's own size; null where it cannot be
let boxes = []; // [x, y, width, height] in pixels of the upright photo
let earlier = []; // what the boxes were before each one that was dragged
let answer = null; // COCO data set
let corner = null; // where a drag began
let dragged = null; // the box that is being drawn
let running = null; // AbortController of the request on its way
let stopCamera = null; // while it runs

const shown = ({ width, height }) => upright?.width === width && upright.height === height;
const size = () => answer ? answer.images[0] : upright ?? { width: 4, height: 3 };

async function show(file) {
  stopCamera?.();
  running?.abort(); // its answer is of another photo
  [photo, upright, boxes, earlier, answer, corner, dragged] = [file, null, [], [], null, null, null];
  part("answer").hidden = true;
  canvas.ariaLabel = "The photo";
  tell("Reading the photo …");
  const bytes = await file.arrayBuffer().catch(() => null); // once: a file on a disk may change or go before it is sent again
  if (photo !== file) return; // another came meanwhile
  if (!bytes) {
    photo = null;
    for (const id of ["undo", "search"]) offer(id, false);
    draw();
    return fail(`${file.name} cannot be read.`);
  }
  photo = file = new File([bytes], file.name, { type: file.type });
  const reading = running = new AbortController();
  const seen = await byBrowser(file) ?? await byService(file, reading.signal);
  if (photo !== file) return;
  upright = seen;
  invite(!upright);
  part("again").hidden = false;
  draw();
  await send();
}

// The photo as the service sees it; null where the browser does not know its form, as of TIFF, or may not turn it, as a
// WebP with EXIF: Chromium turns by that only JPEG and PNG.
async function byBrowser(file) {
  const head = new Uint8Array(await file.slice(0, 21).arrayBuffer());
  if (String.fromCharCode(...head.slice(8, 16)) === "WEBPVP8X" && head[20] & 8) return null;
  const whole = await createImageBitmap(file).catch(() => null);
  if (!whole) return null;
  const { width, height } = whole;
  const picture = document.createElement("canvas"); // a whole one of 50 megapixels would be drawn anew with every move
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  [picture.width, picture.height] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = picture.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(whole, 0, 0, picture.width, picture.height);
  whole.close();
  return { picture, width, height };
}

// The same by the service, which draws nobody on it; null where it refuses it, as it will again and say why.
async function byService(file, signal) {
  const headers = { ...headersOf(file), Accept: "image/jpeg" };
  const response = await fetch("v1/pose?boxes=", { method: "POST", body: file, headers, signal }).catch(() => null);
  return response?.ok ? byBrowser(await response.blob()) : null;
}

// Follow the people before the camera until it is stopped, by a photo or the button.
async function film() {
  stopCamera?.();
  running?.abort();
  const before = { photo, upright, boxes, earlier, answer };
  [photo, upright, boxes, earlier, answer, corner, dragged] = [null, null, [], [], null, null, null];
  for (const id of ["retry", "undo", "search"]) offer(id, false);
  part("places").value = "";
  part("answer").hidden = true;
  draw();
  part("again").hidden = false;
  invite(false, "film");
  tell("Waiting for the camera …");
  canvas.ariaLabel = "What the camera sees";
  const camera = new AbortController();
  const off = () => {
    stopCamera = null;
    part("rate").textContent = "";
    part("film").textContent = "Use the camera";
    if (!upright) invite(true);
  };
  stopCamera = () => {
    off();
    camera.abort();
  };
  part("film").textContent = "Stop the camera";
  const giveBack = () => { // what was there, where there is no camera or no stream
    if (before.photo) ({ photo, upright, boxes, earlier, answer } = before);
    part("answer").hidden = !answer;
    for (const id of ["undo", "search"]) offer(id, boxes.length > 0);
    part("places").value = written(boxes);
    invite(!upright && !answer);
    canvas.ariaLabel = "The photo";
    draw();
    offer("retry", Boolean(photo && !answer));
  };
  let told = performance.now(), frames = 0;
  const tellOnce = (words, problem) => { // what is told is read out
    if (part("status").textContent !== words) tell(words, problem);
  };
  const seen = (frame, content) => {
    if (!content.annotations) return tellOnce(problemOf(content, content.status), true);
    upright = { picture: frame, width: frame.width, height: frame.height };
    answer = content;
    draw();
    frames += 1;
    const seconds = (performance.now() - told) / 1000;
    if (seconds < 1) return;
    const people = content.annotations.length;
    tellOnce(`${people === 1 ? "1 person" : `${people} people`}.`);
    part("rate").textContent = `${Number((frames / seconds).toPrecision(2))} frames a second, ${content.timing.total.toFixed(0)} ms for this one in the service.`;
    [told, frames] = [performance.now(), 0];
  };
  const ended = async (words) => {
    off();
    if (words) return tell(words, true);
    giveBack();
    tell("The service does not open the stream.", true);
    // A page is not told why; what else the service refuses may say it.
    if (await listModels() && !stopCamera && photo === before.photo) {
      tell("The service does not open the stream: all its streams are taken, or it has none (POSE_MAX_STREAMS, POSE_DETECTOR), or a proxy on the way does not pass on Host and Upgrade.", true);
    }
  };
  try {
    await follow(query(), part("key").value, camera.signal, seen, ended);
  } catch (error) {
    if (camera.signal.aborted) return;
    off();
    giveBack();
    tell(`The camera cannot be used: ${error.message.replace(/\.$/, "")}.`, true);
  }
}

function headersOf(file) {
  return { "Content-Type": TYPES.includes(file.type) ? file.type : "application/octet-stream", ...keyHeaders() };
}

// The key in UTF-8, as the service has it: a header here is a text of one character a byte.
function keyHeaders() {
  const key = part("key").value;
  return key ? { "X-API-Key": String.fromCharCode(...new TextEncoder().encode(key)) } : {};
}

// Where a key is wanted, or given: a link carries none.
function askForKey(wanted) {
  const keys = wanted || part("key").value !== "";
  [part("keys").hidden, part("models").hidden] = [!keys, keys];
}

function query() {
  const options = new URLSearchParams();
  if (part("model").value) options.set("model", part("model").value);
  if (part("flip").checked) options.set("flip_test", "true");
  if (boxes.length) options.set("boxes", written(boxes));
  const text = options.toString().replaceAll("%2C", ",").replaceAll("%3B", ";").replaceAll("%2F", "/");
  return text && `?${text}`;
}

const written = (several) => several.map((box) => box.map((value) => Math.round(value * 100) / 100).join(",")).join(";");

async function send() {
  if (stopCamera) return film(); // with the options as they are now
  if (!photo) return;
  running?.abort();
  const request = running = new AbortController();
  offer("retry", false);
  for (const id of ["undo", "search"]) offer(id, boxes.length > 0); // also where they are refused
  part("places").value = written(boxes);
  tell(boxes.length ? "Looking at the people in the boxes …" : "Looking for people …");
  const headers = headersOf(photo);
  const asked = `v1/pose${query()}`;
  const started = performance.now();
  try {
    const response = await fetch(asked, { method: "POST", body: photo, headers, signal: request.signal });
    const content = await response.json().catch(() => null);
    const took = performance.now() - started;
    if (request.signal.aborted) return;
    askForKey(response.status === 401);
    if (response.ok && content?.annotations) {
      if (!upright) { // the service may have been too busy, or have wanted a key
        const seen = await byService(photo, request.signal);
        if (request.signal.aborted) return;
        upright = seen;
      }
      answer = content;
      report(content, response.headers.get("Server-Timing") ?? "", took, asked, headers["Content-Type"]);
    } else {
      const wait = Number(response.headers.get("Retry-After"));
      const passing = [408, 429].includes(response.status) || response.status >= 500;
      fail(problemOf(content, response.status) + (wait > 0 ? ` Try again in ${wait} s.` : ""), passing);
    }
  } catch (error) {
    if (request.signal.aborted) return;
    fail(noAnswer(error), true);
  }
  draw();
}

const noAnswer = (error) => `No answer from the service: ${error.message.replace(/\.$/, "")}.`;

function problemOf(content, status) {
  if (status === 401) return part("key").value ? "This key is not accepted." : "This service wants an API key.";
  if (!content?.title) return `Status ${status}, with an answer that is not this service's.`;
  const detail = (content.detail ?? "").replace(/^images\.0\.boxes\.(\d+)/, (_, number) => `Box ${Number(number) + 1}`)
    .replace(/^images\.0/, "The photo").replace(" (with curl, @ goes before a file's name)", "");
  const named = status >= 500 && content.request_id ? ` (Request ${content.request_id}.)` : ""; // as the log has it
  return `${content.title}. ${detail}${named}`;
}

function fail(words, passing = false) {
  answer = null;
  if (!upright) invite(true);
  part("answer").hidden = true;
  canvas.ariaLabel = "The photo";
  offer("retry", passing);
  tell(words, true);
}

// The invitation, while there is nothing to see; without it the keyboard's focus goes to a button that stays.
function invite(whether, next = "another") {
  const within = part("invitation").contains(document.activeElement);
  part("invitation").hidden = !whether;
  part("stage").classList.toggle("filled", !whether);
  if (within && !whether) part(next).focus();
}

// Show a button or hide it; one that is hidden leaves the keyboard's focus to its neighbour.
function offer(id, whether) {
  if (!whether && document.activeElement === part(id)) part("another").focus();
  part(id).hidden = !whether;
}

function tell(text, problem = false) {
  part("status").textContent = text;
  part("status").classList.toggle("problem", problem);
}

function report(content, header, took, asked, type) {
  const stages = header.split(",").map((stage) => stage.trim().match(/^(\w+);dur=([\d.]+)$/)?.slice(1)).filter(Boolean);
  const total = Number(stages.find(([name]) => name === "total")?.[1] ?? took);
  const people = content.annotations.length;
  const where = people ? "" : " You can drag a box around a person.";
  const unseen = shown(content.images[0]) ? "" : " This browser cannot show this photo, or not upright; only the skeletons are drawn.";
  tell(`${people === 1 ? "1 person" : `${people} people`} by ${content.info.model}/${content.info.model_version} in ${total.toFixed(0)} ms `
    + `(${took.toFixed(0)} ms round trip).${where}${unseen}`);
  canvas.ariaLabel = `The photo with the skeletons of ${people === 1 ? "1 person" : `${people} people`}`;
  part("timing").replaceChildren(...stages.map(([name, value]) => row(name, Number(value), total)));
  const quoted = `'${photo.name.replaceAll("'", "'\\''")}'`;
  const key = part("key").value && ' -H "X-API-Key: $KEY"';
  part("curl").textContent = `curl --data-binary @${quoted} -H 'Content-Type: ${type}'${key} '${new URL(asked, location.href)}'`;
  part("json").textContent = JSON.stringify(content, null, 1).replace(/\[[^[\]{}]*\]/g, (list) => list.replace(/\s+/g, " "));
  part("answer").hidden = false;
  invite(false);
}

function row(name, milliseconds, total) {
  const line = document.createElement("tr");
  const bar = Object.assign(document.createElement("meter"), { max: total, value: milliseconds, ariaLabel: name });
  const cells = [document.createElement("th"), document.createElement("td"), document.createElement("td")];
  cells[0].textContent = name;
  cells[1].append(bar);
  cells[2].textContent = `${milliseconds.toFixed(1)} ms`;
  line.append(...cells);
  return line;
}

function draw() {
  if (!upright && !answer) {
    canvas.hidden = true;
    return;
  }
  const { width, height } = size();
  const scale = Math.min(4, LONGEST / Math.max(width, height)); // that lines over a small photo are smooth
  canvas.hidden = false;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  if (!answer || shown(answer.images[0])) context.drawImage(upright.picture, 0, 0, canvas.width, canvas.height);
  context.scale(scale, scale);
  context.translate(0.5, 0.5); // (0, 0) is the centre of the first pixel
  context.lineCap = "round";
  const thin = Math.max(width, height) / 600; // in pixels of the photo
  const drawn = part("boxes").checked ? [...answer?.annotations.map((person) => person.bbox) ?? [], ...boxes] : [];
  for (const [colour, wide] of [["#0008", 2 * thin], ["#fff", thin]]) { // so that they are seen on any ground
    [context.strokeStyle, context.lineWidth] = [colour, wide];
    for (const box of dragged ? [...drawn, dragged] : drawn) context.strokeRect(...box);
  }
  if (part("boxes").checked) numberTracks(context, thin);
  for (const person of answer?.annotations ?? []) drawPerson(context, person, answer.categories[0], thin);
}

// The numbers that people have in a video.
function numberTracks(context, thin) {
  context.font = `${14 * size().width / canvas.getBoundingClientRect().width}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { track_id: number, bbox: [x, y] } of (answer?.annotations ?? []).filter((person) => person.track_id)) {
    [context.strokeStyle, context.fillStyle, context.lineWidth] = ["#000", "#fff", 2 * thin];
    context.strokeText(number, x + 3 * thin, y + 3 * thin);
    context.fillText(number, x + 3 * thin, y + 3 * thin);
  }
}

function drawPerson(context, person, { keypoints: names, skeleton }, thin) {
  const joints = jointsOf(person, names);
  const seen = joints.filter((joint) => joint.seen);
  if (!seen.length) return;
  const extent = Math.max(...["x", "y"].map((axis) => Math.max(...seen.map((joint) => joint[axis])) - Math.min(...seen.map((joint) => joint[axis]))));
  const thick = Math.max(thin, extent / 100);
  context.lineWidth = thick;
  for (const [first, second] of skeleton.map((pair) => pair.map((number) => joints[number - 1]))) {
    if (!first.seen || !second.seen) continue;
    context.strokeStyle = first.colour === second.colour ? first.colour : MIDDLE;
    context.beginPath();
    context.moveTo(first.x, first.y);
    context.lineTo(second.x, second.y);
    context.stroke();
  }
  for (const joint of seen) {
    dot(context, joint, thick * 1.5, "#fff");
    dot(context, joint, thick, joint.colour);
    if (!part("errors").checked || joint.error === undefined) continue;
    context.lineWidth = thin;
    context.strokeStyle = joint.colour;
    context.beginPath();
    context.arc(joint.x, joint.y, joint.error, 0, 2 * Math.PI);
    context.stroke();
  }
}

function dot(context, { x, y }, radius, colour) {
  context.fillStyle = colour;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

function jointsOf(person, names) {
  return names.map((name, index) => ({
    name: name.replace("_", " "),
    x: person.keypoints[3 * index],
    y: person.keypoints[3 * index + 1],
    score: person.keypoint_scores[index],
    error: person.keypoint_errors?.[index],
    seen: person.keypoint_scores[index] >= Number(part("threshold").value),
    colour: name.startsWith("left") ? LEFT : name.startsWith("right") ? RIGHT : MIDDLE,
  }));
}

// The place of a pointer in pixels of the photo.
function placeOf(event) {
  const frame = canvas.getBoundingClientRect();
  const { width, height } = size();
  const within = (value, most) => Math.min(Math.max(value, 0), 1) * most - 0.5;
  return [within((event.clientX - frame.left) / frame.width, width), within((event.clientY - frame.top) / frame.height, height)];
}

// What the pointer is nearest to, as the canvas's title.
function describe([x, y]) {
  const reach = 12 * size().width / canvas.getBoundingClientRect().width;
  const near = (answer?.annotations ?? []).flatMap((person) => jointsOf(person, answer.categories[0].keypoints))
    .filter((joint) => joint.seen)
    .map((joint) => ({ ...joint, away: Math.hypot(joint.x - x, joint.y - y) }))
    .filter((joint) => joint.away < reach)
    .sort((one, other) => one.away - other.away)[0];
  canvas.title = near
    ? `${near.name}: score ${near.score.toFixed(2)}` + (near.error === undefined ? "" : `, expected error ${Number(near.error.toPrecision(2))} pixels`)
    : photo ? "Drag a box around a person" : "";
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button || !photo || !(upright || answer)) return; // nothing is asked of a video
  if (event.pointerType === "touch" && !part("mark").checked) return;
  [corner, dragged] = [placeOf(event), null];
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (!event.isPrimary || !(upright || answer)) return;
  if (corner && !(event.buttons & 1)) { // a menu took the end of the drag
    corner = dragged = null;
    draw();
  }
  const [x, y] = placeOf(event);
  if (!corner) return describe([x, y]);
  dragged = [Math.min(x, corner[0]), Math.min(y, corner[1]), Math.abs(x - corner[0]), Math.abs(y - corner[1])];
  draw();
});
canvas.addEventListener("pointerup", (event) => {
  if (!event.isPrimary) return;
  const least = size().width / 100; // less was a click
  if (dragged && dragged[2] > least && dragged[3] > least) {
    // Who was found stays, but whoever this box is drawn around better.
    earlier.push(boxes);
    const others = boxes.length ? boxes : (answer?.annotations ?? []).map(({ bbox }) => bbox);
    boxes = [...others.filter((box) => overlap(box, dragged) < 0.5), dragged];
    send();
  }
  corner = dragged = null;
  draw();
});
canvas.addEventListener("click", (event) => {
  if (event.pointerType === "mouse" || !answer) return;
  describe(placeOf(event)); // fingers and pens see no title
  if (canvas.title.includes(":")) tell(`${canvas.title}.`);
});
canvas.addEventListener("pointercancel", () => {
  corner = dragged = null;
  draw();
});

// Intersection over union of two boxes.
function overlap([x, y, width, height], [left, top, wide, high]) {
  const across = Math.min(x + width, left + wide) - Math.max(x, left);
  const down = Math.min(y + height, top + high) - Math.max(y, top);
  const shared = Math.max(0, across) * Math.max(0, down);
  return shared / (width * height + wide * high - shared);
}

part("retry").addEventListener("click", send);
part("undo").addEventListener("click", () => {
  boxes = earlier.pop() ?? [];
  send();
});
part("search").addEventListener("click", () => {
  [boxes, earlier] = [[], []];
  send();
});
part("another").addEventListener("click", () => part("file").click());
part("film").addEventListener("click", () => {
  if (!stopCamera) return film();
  stopCamera();
  tell("The camera is off.");
});
part("start").addEventListener("click", film);
part("file").addEventListener("change", (event) => {
  if (event.target.files.length) show(event.target.files[0]);
  event.target.value = ""; // so that the same photo may be chosen again
});
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) show(file);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  part("stage").classList.add("over");
});
addEventListener("dragleave", () => part("stage").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  part("stage").classList.remove("over");
  if (event.dataTransfer.files.length > 1) tell("Drop one photo at a time.", true);
  else if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
  else tell("What you dropped is not a file. Save the picture first, or copy and paste it.", true);
});
part("flip").addEventListener("change", send);
part("places").addEventListener("change", ({ target }) => {
  if (!photo) {
    target.value = "";
    return tell("Boxes are of a photo: choose one first.", true);
  }
  const texts = target.value.split(";").filter((text) => text.trim());
  const read = texts.map((text) => text.split(",").map((value) => value.trim() ? Number(value) : NaN));
  const wrong = read.findIndex((box) => box.length !== 4 || !box.every(Number.isFinite));
  if (wrong >= 0) return tell(`A box is x,y,width,height in pixels of the photo; “${texts[wrong].trim()}” is none.`, true);
  earlier.push(boxes);
  boxes = read;
  send();
});
part("model").addEventListener("change", () => {
  takeThreshold();
  send();
});
part("keys").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await listModels()) photo ? send() : tell("The key is accepted.");
});
part("keep").addEventListener("click", () => canvas.toBlob((picture) => save(picture, "-people.jpg"), "image/jpeg", 0.92));
part("save").addEventListener("click", () => save(new Blob([JSON.stringify(answer)], { type: "application/json" }), ".json"));

// Give the browser a file to keep, named after the photo.
function save(content, end) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(content) });
  link.download = photo.name.replace(/\.[^.]*$/, "") + end;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

for (const id of ["threshold", "errors", "boxes"]) part(id).addEventListener("input", redraw);

function redraw() {
  part("least").textContent = Number(part("threshold").value).toFixed(2);
  draw();
}

function takeThreshold() {
  part("threshold").value = part("model").selectedOptions[0].dataset.threshold;
  redraw();
}

// Links to #example show it, wherever they come from.
async function followLink() {
  if (location.hash !== "#example") return;
  history.replaceState(null, "", location.pathname);
  const before = photo;
  try {
    const response = await fetch("static/example.jpg");
    if (!response.ok) throw new Error(`status ${response.status}`);
    const content = await response.blob();
    if (photo === before && !stopCamera) await show(new File([content], "example.jpg", { type: "image/jpeg" }));
  } catch (error) {
    tell(`The example cannot be loaded: ${error.message}.`, true);
  }
}
addEventListener("hashchange", followLink);

// Whether the service told its models; asks for a key where it wants one.
async function listModels() {
  try {
    const response = await fetch("v1/models", { headers: keyHeaders() });
    askForKey(response.status === 401);
    const content = await response.json().catch(() => null);
    if (!response.ok || !content?.models) {
      tell(problemOf(content, response.status), true);
      return false;
    }
    const models = content.models.filter(({ kind }) => kind === "pose");
    const chosen = part("model").value;
    part("model").replaceChildren(...models.map(({ name, version, default: preferred, keypoint_threshold: threshold }) => {
      const option = new Option(`${name}/${version}`, `${name}/${version}`, preferred, preferred);
      option.dataset.threshold = threshold;
      return option;
    }));
    if (models.some(({ name, version }) => `${name}/${version}` === chosen)) part("model").value = chosen;
    else takeThreshold();
    return true;
  } catch (error) {
    tell(noAnswer(error), true);
    return false;
  }
}

if (part("file").files.length) part("file").dispatchEvent(new Event("change")); // chosen before this ran
await listModels();
await followLink();
