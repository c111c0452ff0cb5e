// Swagger UI on the service's own document, which needs a key where the service has keys.

const keys = document.getElementById("keys");

const words = document.getElementById("status");

async function show(key) {
  words.textContent = "";
  const response = await fetch("openapi.json", { headers: key ? { "X-API-Key": key } : {} });
  keys.hidden = response.status !== 401;
  if (response.status === 401) {
    words.textContent = key ? "This key is not accepted." : "This service wants an API key.";
    return;
  }
  if (!response.ok) throw new Error(`the service answers with status ${response.status}`);
  const ui = SwaggerUIBundle({
    dom_id: "#api",
    spec: { ...(await response.json()), servers: [{ url: "." }] }, // the page may lie under a proxy's prefix
    deepLinking: true,
    validatorUrl: null,
    onComplete: () => key && ui.preauthorizeApiKey("key", key),
  });
}

function tell(error) {
  words.textContent = `The API cannot be shown: ${error.message}.`;
}

keys.addEventListener("submit", (event) => {
  event.preventDefault();
  // In UTF-8, as the service has it: a header here is a text of one character a byte.
  show(String.fromCharCode(...new TextEncoder().encode(document.getElementById("key").value))).catch(tell);
});
show("").catch(tell);
