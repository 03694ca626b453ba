# claa-sglang on SGLang's own image: docker build -t claa-sglang .
# docker run --gpus all -p 30000:30000 claa-sglang --model-path meta-llama/Llama-3.1-8B-Instruct
# With --build-arg SGLANG=… another tag of it. The plugin refuses to start on an SGLang that does not fit.
ARG SGLANG=lmsysorg/sglang:v0.5.23
FROM ${SGLANG}

COPY . /opt/claa-sglang
# SGLang and what it needs are in the image: nothing of it is to be replaced.
RUN pip install --no-cache-dir --no-deps /opt/claa-sglang \
    && claa-sglang --version

EXPOSE 30000
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0", "--enable-claa"]
