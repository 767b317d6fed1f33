# Triptych on Triton's container: its tritonserver, and one Python environment an engine.
#
#   docker build -t triptych .
#   docker run --gpus all --shm-size 2g -p 8000-8002:8000-8002 -v /models/MODEL:/model:ro triptych
#
# For TensorRT-LLM, which nobody has tried, build with
# --build-arg ENGINE=trtllm --build-arg BASE=nvcr.io/nvidia/tritonserver:25.10-trtllm-python-py3
# and run with `--engine trtllm --model /model` after the image's name.
ARG BASE=nvcr.io/nvidia/tritonserver:25.10-py3
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/triptych
COPY pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
COPY scripts/setup scripts/setup
COPY src/ src/
COPY client/ client/

# An engine for NVIDIA GPUs; the container brings the tritonserver.
ARG ENGINE=vllm
RUN scripts/setup --engine ${ENGINE} --gpu --container \
 && rm -rf /opt/triptych/.cache

COPY model_repository/ model_repository/

USER triton-server
ENV PATH=/opt/triptych/.venvs/${ENGINE}/bin:${PATH}
EXPOSE 8000 8001 8002
ENTRYPOINT ["triptych", "serve", "--host", "0.0.0.0"]
CMD ["--model", "/model"]
