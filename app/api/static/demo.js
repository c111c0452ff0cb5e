// The demo page: a photo goes to POST /v1/pose as a body of its own, and what comes back is drawn over it.
// Boxes that are dragged on the photo are sent with it; without any the service finds the people.

const part = (id) => document.getElementById(id);
const canvas = part("canvas");
const LONGEST = 1600; // of the canvas, in its own pixels
const LEFT = "#50c850", RIGHT = "#ff783c", MIDDLE = "#3cb4e6"; // the person's, as in the pictures that the service draws

let photo = null; // the file
let bitmap = null; // the photo as the browser shows it, upright; null where it cannot
let boxes = []; // [x, y, width, height] in pixels of the upright photo
let answer = null; // COCO data set
let dragged = null; // the box that is being drawn
let running = null; // AbortController of the request on its way

const size = () => answer ? answer.images[0] : bitmap ?? { width: 4, height: 3 };

async function show(file) {
  running?.abort(); // its answer is of another photo
  [photo, bitmap, boxes, answer] = [file, null, [], null];
  const seen = await createImageBitmap(file).catch(() => null); // no TIFF, say; the service may know it all the same
  if (photo !== file) return; // another came meanwhile
  bitmap = seen;
  part("invitation").hidden = true;
  part("again").hidden = false;
  part("stage").classList.add("filled");
  draw();
  await send();
}

function query() {
  const options = new URLSearchParams();
  if (part("model").value) options.set("model", part("model").value);
  if (part("flip").checked) options.set("flip_test", "true");
  if (boxes.length) options.set("boxes", boxes.map((box) => box.map((value) => Math.round(value * 100) / 100).join(",")).join(";"));
  const text = options.toString().replaceAll("%2C", ",").replaceAll("%3B", ";").replaceAll("%2F", "/");
  return text && `?${text}`;
}

async function send() {
  if (!photo) return;
  running?.abort();
  const request = running = new AbortController();
  part("search").hidden = !boxes.length; // also where they are refused
  tell(boxes.length ? "Looking at the people in the boxes …" : "Looking for people …");
  const headers = { "Content-Type": photo.type || "application/octet-stream" };
  if (part("key").value) headers["X-API-Key"] = part("key").value;
  const asked = `v1/pose${query()}`;
  const started = performance.now();
  try {
    const response = await fetch(asked, { method: "POST", body: photo, headers, signal: request.signal });
    const content = await response.json().catch(() => ({ title: `Status ${response.status}`, detail: "The answer is no JSON." }));
    const took = performance.now() - started;
    if (request.signal.aborted) return;
    part("keys").hidden = response.status !== 401 && !part("key").value;
    if (!response.ok) {
      answer = null;
      part("answer").hidden = true;
      tell(`${content.title}. ${content.detail}`, true);
    } else {
      answer = content;
      report(content, response.headers.get("Server-Timing") ?? "", took, asked, headers["Content-Type"]);
    }
  } catch (error) {
    if (request.signal.aborted) return;
    answer = null;
    part("answer").hidden = true;
    tell(`No answer from the service: ${error.message}.`, true);
  }
  draw();
}

function tell(text, problem = false) {
  part("status").textContent = text;
  part("status").classList.toggle("problem", problem);
}

function report(content, header, took, asked, type) {
  const stages = header.split(", ").filter(Boolean).map((stage) => stage.split(";dur="));
  const total = Number(stages.find(([name]) => name === "total")?.[1] ?? took);
  const people = content.annotations.length;
  const where = people ? "" : " You can drag a box around one.";
  tell(`${people === 1 ? "1 person" : `${people} people`} by ${content.info.model}/${content.info.model_version} in ${total.toFixed(0)} ms, `
    + `${took.toFixed(0)} ms with the way there and back.${where}`);
  part("timing").replaceChildren(...stages.map(([name, value]) => row(name, Number(value), total)));
  const quoted = `'${photo.name.replaceAll("'", "'\\''")}'`;
  const key = part("key").value && ' -H "X-API-Key: $KEY"';
  part("curl").textContent = `curl --data-binary @${quoted} -H 'Content-Type: ${type}'${key} '${new URL(asked, location.href)}'`;
  part("json").textContent = JSON.stringify(content, null, 1).replace(/\[[^[\]{}]*\]/g, (list) => list.replace(/\s+/g, " "));
  part("answer").hidden = false;
}

function row(name, milliseconds, total) {
  const line = document.createElement("tr");
  const bar = Object.assign(document.createElement("meter"), { max: total, value: milliseconds });
  const cells = [document.createElement("th"), document.createElement("td"), document.createElement("td")];
  cells[0].textContent = name;
  cells[1].append(bar);
  cells[2].textContent = `${milliseconds.toFixed(1)} ms`;
  line.append(...cells);
  return line;
}

function draw() {
  if (!photo || (!bitmap && !answer)) {
    canvas.hidden = true;
    return;
  }
  const { width, height } = size();
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  canvas.hidden = false;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  if (bitmap?.width === width && bitmap.height === height) context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  context.scale(scale, scale);
  context.translate(0.5, 0.5); // (0, 0) is the centre of the first pixel
  context.lineCap = "round";
  const thin = 2 / scale;
  context.lineWidth = thin;
  context.strokeStyle = "#fff";
  const drawn = part("boxes").checked ? answer?.annotations.map((person) => person.bbox) ?? boxes : [];
  for (const box of dragged ? [...drawn, dragged] : drawn) context.strokeRect(...box);
  for (const person of answer?.annotations ?? []) drawPerson(context, person, answer.categories[0], thin);
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
    ? `${near.name}: score ${near.score.toFixed(2)}` + (near.error === undefined ? "" : `, some ${near.error.toPrecision(2)} pixels off`)
    : "Drag a box around a person";
}

let corner = null;
canvas.addEventListener("pointerdown", (event) => {
  corner = placeOf(event);
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = placeOf(event);
  if (!corner) return describe([x, y]);
  dragged = [Math.min(x, corner[0]), Math.min(y, corner[1]), Math.abs(x - corner[0]), Math.abs(y - corner[1])];
  draw();
});
canvas.addEventListener("pointerup", () => {
  const least = size().width / 100; // less was a click
  if (dragged && dragged[2] > least && dragged[3] > least) {
    boxes.push(dragged);
    send();
  }
  corner = dragged = null;
  draw();
});
canvas.addEventListener("pointercancel", () => {
  corner = dragged = null;
  draw();
});

part("search").addEventListener("click", () => {
  boxes = [];
  send();
});
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
  if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
});
for (const id of ["model", "flip"]) part(id).addEventListener("change", send);
part("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  listModels().then(send);
});
for (const id of ["threshold", "errors", "boxes"]) {
  part(id).addEventListener("input", () => {
    part("least").textContent = Number(part("threshold").value).toFixed(2);
    draw();
  });
}

// Links to #example show it, wherever they come from.
async function followLink() {
  if (location.hash !== "#example") return;
  const content = await (await fetch("static/example.jpg")).blob();
  await show(new File([content], "example.jpg", { type: "image/jpeg" }));
  history.replaceState(null, "", location.pathname);
}
addEventListener("hashchange", followLink);

async function listModels() {
  const headers = part("key").value ? { "X-API-Key": part("key").value } : {};
  const response = await fetch("v1/models", { headers }).catch(() => null);
  part("keys").hidden = response?.status !== 401 && !part("key").value;
  if (!response?.ok) return;
  const models = (await response.json()).models.filter(({ kind }) => kind === "pose");
  part("model").replaceChildren(...models.map((model) => new Option(`${model.name}/${model.version}`, `${model.name}/${model.version}`, model.default, model.default)));
  const standard = models.find((model) => model.default);
  part("threshold").value = standard.keypoint_threshold;
  part("least").textContent = standard.keypoint_threshold.toFixed(2);
}

await listModels();
await followLink();
