// Swagger UI on the service's own document, which needs a key where the service has keys.

const keys = document.getElementById("keys");

async function show(key) {
  const response = await fetch("openapi.json", { headers: key ? { "X-API-Key": key } : {} });
  keys.hidden = response.status !== 401;
  if (!response.ok) return;
  const ui = SwaggerUIBundle({
    dom_id: "#api",
    spec: await response.json(),
    deepLinking: true,
    validatorUrl: null,
    onComplete: () => key && ui.preauthorizeApiKey("key", key),
  });
}

keys.addEventListener("submit", (event) => {
  event.preventDefault();
  show(document.getElementById("key").value);
});
show("");
