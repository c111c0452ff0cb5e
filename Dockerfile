# syntax=docker/dockerfile:1
FROM python:3.13-slim AS builder
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY requirements/service.txt .
RUN --mount=type=cache,target=/root/.cache \
    python -m venv --without-pip /opt/venv && \
    pip --python /opt/venv install --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: -r service.txt
# What the service never loads: tests, OpenCV's cascades, ONNX Runtime's converters and its library for C (the module for Python
# holds it once more), symbols for debuggers.
WORKDIR /opt/venv/lib/python3.13/site-packages
RUN rm -rf cv2/data/*.xml onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/datasets && \
    rm -f onnxruntime/capi/libonnxruntime.so.* && \
    find . -type d -name tests -prune -exec rm -rf {} + && \
    strip --strip-unneeded uvloop/*.so httptools/parser/*.so
WORKDIR /srv
COPY LICENSE .
COPY app app
COPY model_store model_store
# The checkout may be one that only its owner reads (umask 077); the service runs as another user.
RUN chmod -R a+rX . && python -m compileall -q app

FROM python:3.13-slim
LABEL org.opencontainers.image.title="LPN pose service" \
      org.opencontainers.image.description="COCO keypoints of the people in a photo, on CPUs, over HTTP"
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /srv /srv
WORKDIR /srv
ENV PATH=/opt/venv/bin:$PATH POSE_HOST=0.0.0.0 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('POSE_PORT', 8000)), timeout=2); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
