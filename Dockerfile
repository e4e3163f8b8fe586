# The part that needs no GPU: compress, export, verify and bench on ONNX Runtime, bundles for devices.
#   docker build -t moee .
#   docker run --rm -v "$PWD:/work" moee compress vit_small_patch16_224 --checkpoint model.pth.tar --data images --out runs/mine
FROM python:3.11.13-slim-bookworm

# g++ compiles the operator of ONNX Runtime on the machine that runs it
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE THIRD_PARTY_NOTICES.md ./
COPY moee ./moee
COPY exporter ./exporter
COPY plugins ./plugins
RUN pip install --no-cache-dir -c constraints.txt . \
    && rm -rf /src/build /src/*.egg-info

RUN useradd --create-home --uid 1000 moee \
    && mkdir /work \
    && chown moee /work
USER 1000:1000
WORKDIR /work
ENV OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["moee"]
CMD ["--help"]
