# The server on Jetson Orin with JetPack 6, built on the device. NOT RUN: it needs a Jetson.
#   make deploy-wheel && docker build --file examples/deploy/jetpack6.Dockerfile --tag crl:jetpack6 .
#   docker run --runtime nvidia --gpus all --group-add "$(getent group video | cut -d: -f3)" \
#     --group-add "$(getent group render | cut -d: -f3)" …
# The base brings CUDA 12.6, TensorRT 10.3 and Python 3.10. The groups own the device's files.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv
COPY examples/deploy/locks/jetpack6.txt dist/crl_embeddings-*.whl /build/
RUN python3 -m venv --system-site-packages /opt/crl \
    && /opt/crl/bin/pip install --no-cache-dir --require-hashes --only-binary :all: \
        --no-deps --requirement /build/jetpack6.txt \
    && /opt/crl/bin/pip install --no-cache-dir --no-index --no-deps /build/crl_embeddings-*.whl \
    && /opt/crl/bin/pip uninstall --yes pip setuptools

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 crl \
    && useradd --system --uid 10001 --gid crl --home-dir /var/lib/crl --no-create-home \
        --shell /usr/sbin/nologin crl \
    && install --directory --owner crl --group crl /var/lib/crl /var/cache/crl
COPY --from=build /opt/crl /opt/crl
COPY examples/deploy/health.py /opt/crl/health.py
ENV PATH=/opt/crl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CRL_SERVE_ADDRESS=0.0.0.0:50051 \
    CRL_SERVE_METRICS=0.0.0.0:9464 \
    CRL_SERVE_LOG_FORMAT=json \
    CRL_BASES=/var/lib/crl/bases \
    CRL_CACHE=/var/cache/crl
# Bases and records of engines. Everything else may be read-only: docker run --read-only
WORKDIR /var/lib/crl
USER 10001:10001
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/crl/health.py"]
# As process 1, a server that is still loading its model would ignore SIGTERM; tini does not.
ENTRYPOINT ["tini", "--", "crl"]
CMD ["serve"]
