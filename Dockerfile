# The build runs on the builder's platform and compiles for that of the image.
FROM --platform=$BUILDPLATFORM golang:1.26-alpine AS build
WORKDIR /src
# Modules change less often than code, so download them in a layer of their own.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS TARGETARCH
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags="-s -w" -o /user-service .

FROM scratch
# Root certificates for amqps:// and for TLS to PostgreSQL.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /user-service /user-service
USER 65532:65532
ENV HOST=0.0.0.0 PORT=8000
EXPOSE 8000
# The image has no shell and no curl, so the binary performs the check. The start period covers the
# wait for PostgreSQL.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["/user-service", "healthcheck"]
ENTRYPOINT ["/user-service"]
