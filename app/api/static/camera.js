// The camera: its frames go to WS v1/stream, and every answer is handed on with the frame that it is of.

const LONGEST = 960; // of a frame, in pixels
const QUALITY = 0.8; // of its JPEG
const AHEAD = 2; // frames on their way: while one is worked on the next one travels

// Open camera and stream; the query is a request's. Calls seen(frame, answer) for every answer and ended(words) once, with
// nothing where it was stopped. Resolves to a function that stops both; rejects where there is no camera.
export async function follow(query, key, seen, ended) {
  if (!navigator.mediaDevices) throw new Error("browsers give the camera to pages of https:// and of localhost alone");
  const camera = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, height: { ideal: 720 } } });
  const video = Object.assign(document.createElement("video"), { srcObject: camera, muted: true, playsInline: true });
  await video.play();
  const subprotocols = ["pose"];
  if (key) subprotocols.push(`key.${base64url(key)}`); // a page can send no header with a WebSocket
  const socket = new WebSocket(new URL(`v1/stream${query}`, location.href.replace(/^http/, "ws")), subprotocols);
  const frames = new Map(); // that are on their way, by their number
  let count = 0, opened = false, stopped = false, wake = () => {};

  socket.onopen = async () => {
    opened = true;
    while (socket.readyState === WebSocket.OPEN) {
      if (frames.size >= AHEAD) {
        await new Promise((resolve) => { wake = resolve; });
        continue;
      }
      await nextOf(video);
      const frame = copyOf(video);
      const file = await new Promise((resolve) => { frame.toBlob(resolve, "image/jpeg", QUALITY); });
      if (socket.readyState !== WebSocket.OPEN) return;
      frames.set(count++, frame);
      socket.send(file);
    }
  };
  socket.onmessage = ({ data }) => {
    const answer = JSON.parse(data);
    const number = answer.images?.[0].id ?? answer.image_id;
    const frame = frames.get(number);
    for (const earlier of [...frames.keys()].filter((each) => each <= number)) frames.delete(earlier);
    wake();
    if (!stopped) seen(frame, answer);
  };
  socket.onclose = ({ code, reason }) => {
    wake();
    for (const track of camera.getTracks()) track.stop();
    if (stopped) ended("");
    else if (opened) ended(`The stream ended: ${reason || (code === 1012 ? "the service stops." : `code ${code}.`)}`);
    else ended("The service does not take the stream: it follows as many as it may, or a proxy on the way knows no WebSockets.");
  };
  camera.getTracks()[0].onended = () => socket.close();
  return () => {
    stopped = true;
    socket.close();
  };
}

function base64url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// Resolves when the video shows its next frame.
function nextOf(video) {
  return new Promise((resolve) => {
    if (video.requestVideoFrameCallback && !document.hidden) video.requestVideoFrameCallback(resolve);
    else setTimeout(resolve, 33);
  });
}

function copyOf(video) {
  const frame = document.createElement("canvas");
  const scale = Math.min(1, LONGEST / Math.max(video.videoWidth, video.videoHeight));
  frame.width = Math.round(video.videoWidth * scale);
  frame.height = Math.round(video.videoHeight * scale);
  frame.getContext("2d").drawImage(video, 0, 0, frame.width, frame.height);
  return frame;
}
