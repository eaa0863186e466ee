# A server in a container; docs/deployment.md has the commands to build and run it.
#   docker build -t headwater .
#   docker build -t headwater:gpu --build-arg GPU=1 .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG GPU=0
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /clone
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY release release
COPY src src
# a wheel with the CPU kernels of every instruction set: the image runs on other processors than the one that built it
RUN python -m venv /wheel \
 && /wheel/bin/pip install ${PIP_ARGS} -c constraints.txt build setuptools ziglang \
 && SOURCE_DATE_EPOCH=315532800 /wheel/bin/python release/build_wheels.py --platform here
RUN python -m venv /opt/headwater \
 && if [ "${GPU}" = 1 ]; then extra="[gpu]"; else extra=""; fi \
 && /opt/headwater/bin/pip install ${PIP_ARGS} -c constraints.txt "$(ls dist/*.whl)${extra}"

FROM python:${PYTHON}-slim
ARG GPU=0
# Triton compiles the launchers of its kernels with the system's compiler
# hadolint ignore=DL3008
RUN if [ "${GPU}" = 1 ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi \
 && useradd --uid 1000 --create-home headwater \
 && install -d -o headwater -g headwater /models
COPY --from=build /opt/headwater /opt/headwater
ENV PATH=/opt/headwater/bin:$PATH PYTHONUNBUFFERED=1 HEADWATER_CACHE=/models HF_HOME=/models/huggingface
# models, packed weights and compiled kernels: a volume keeps them, so only the first start fetches them
ENV XDG_CACHE_HOME=/models/cache TRITON_CACHE_DIR=/models/cache/triton
VOLUME /models
USER 1000
WORKDIR /home/headwater
EXPOSE 30000
HEALTHCHECK --interval=10s --timeout=6s --start-period=15m --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:30000/health', timeout=5)"]
ENTRYPOINT ["headwater", "serve", "--host", "0.0.0.0", "--port", "30000"]
