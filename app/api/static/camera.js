// The camera: its frames go to WS v1/stream, and every answer is handed on with the frame that it is of.

const LONGEST = 960; // of a frame, in pixels
const QUALITY = 0.8; // of its JPEG
const AHEAD = 2; // frames on their way: while one is worked on the next one travels
const PAUSE = 1000; // milliseconds without a new frame where the service has too much to do

// Open camera and stream; the query is a request's. Calls seen(frame, answer) for every answer and ended(words) where it ends by
// itself, with no words where the service does not open the stream. The signal stops both. Rejects where there is no camera, or
// where it was stopped before.
export async function follow(query, key, signal, seen, ended) {
  if (!navigator.mediaDevices) throw new Error("browsers give the camera to pages of https:// and of localhost alone");
  const camera = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, height: { ideal: 720 } } });
  const tracks = camera.getTracks();
  const release = () => tracks.forEach((track) => track.stop());
  signal.addEventListener("abort", release);
  const subprotocols = ["pose"];
  if (key) subprotocols.push(`key.${base64url(key)}`); // a page can send no header with a WebSocket
  let video, socket;
  try {
    video = Object.assign(document.createElement("video"), { srcObject: camera, muted: true, playsInline: true });
    signal.throwIfAborted();
    await Promise.race([video.play(), new Promise((_, reject) => { signal.onabort = () => reject(signal.reason); })]);
    socket = new WebSocket(new URL(`v1/stream${query}`, location.href.replace(/^http/, "ws")), subprotocols);
  } catch (error) {
    release();
    throw error;
  }
  const frames = new Map(); // that are on their way, by their number
  // One is shown, one is being copied. New ones for each frame would pile up faster than some browsers clear away.
  const canvases = Array.from({ length: AHEAD + 2 }, () => document.createElement("canvas"));
  let count = 0, opened = false, over = false, wake = () => {};
  const end = (words) => {
    if (over) return;
    over = true;
    release();
    socket.close();
    wake();
    ended(words);
  };

  socket.onopen = async () => {
    opened = true;
    while (!over) {
      if (frames.size >= AHEAD) {
        await new Promise((resolve) => { wake = resolve; });
        continue;
      }
      await nextOf(video);
      const frame = copied(video, canvases[count % canvases.length]);
      const file = await new Promise((resolve) => { frame.toBlob(resolve, "image/jpeg", QUALITY); });
      if (over || !file) continue;
      frames.set(count++, frame);
      socket.send(file);
    }
  };
  socket.onmessage = ({ data }) => {
    const answer = JSON.parse(data);
    const number = answer.images?.[0].id ?? answer.image_id;
    const frame = frames.get(number);
    const makeRoom = () => {
      for (const earlier of [...frames.keys()].filter((each) => each <= number)) frames.delete(earlier);
      wake();
    };
    if ([429, 503].includes(answer.status)) setTimeout(makeRoom, PAUSE);
    else makeRoom();
    if (!over) seen(frame, answer);
  };
  socket.onclose = ({ code, reason }) => {
    const known = { 1006: "the connection broke.", 1012: "the service is stopping." };
    end(opened ? `The stream ended: ${reason || known[code] || `code ${code}.`}` : "");
  };
  tracks[0].onended = () => end("The camera was disconnected or blocked.");
  signal.addEventListener("abort", () => {
    over = true;
    socket.close();
    wake();
  });
}

function base64url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// Resolves when the video shows its next frame; where the page is hidden, and no frame is shown, after a second.
function nextOf(video) {
  return new Promise((resolve) => {
    setTimeout(resolve, video.requestVideoFrameCallback ? 1000 : 33);
    video.requestVideoFrameCallback?.(resolve);
  });
}

function copied(video, frame) {
  const scale = Math.min(1, LONGEST / Math.max(video.videoWidth, video.videoHeight));
  frame.width = Math.round(video.videoWidth * scale);
  frame.height = Math.round(video.videoHeight * scale);
  frame.getContext("2d").drawImage(video, 0, 0, frame.width, frame.height);
  return frame;
}
