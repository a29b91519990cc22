// Embeds images from Node.js and prints the text of the criterion that fits each image best.
//
// Usage: npm install, start `crl serve`, then node embed.mjs HOST:PORT CRITERION IMAGE...
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, criterion, ...files] = process.argv.slice(2);
const root = fileURLToPath(new URL("../../proto", import.meta.url));
const definition = loader.loadSync(["crl/v1/embedding.proto", "crl/v1/basis.proto"], {
  includeDirs: [root],
  keepCase: true,
  defaults: true,
  longs: Number,
  enums: String,
});
const { EmbeddingService, BasisService } = grpc.loadPackageDefinition(definition).crl.v1;
const credentials = grpc.credentials.createInsecure();

const call = (service, method, request) =>
  new Promise((resolve, reject) => {
    const client = new service(address, credentials);
    client[method](request, { deadline: Date.now() + 30_000 }, (error, reply) => {
      client.close();
      error ? reject(error) : resolve(reply);
    });
  });

// the tensor has little-endian float32 elements, row by row
const rowsOf = ({ data, shape }) => {
  const floats = new Float32Array(new Uint8Array(data).buffer);
  const [n, m] = shape;
  return Array.from({ length: n }, (_, i) => floats.subarray(i * m, (i + 1) * m));
};

const images = files.map((file) => ({ encoded: readFileSync(file) }));
const reply = await call(EmbeddingService, "Embed", { images, criteria: [criterion] });
const { info } = await call(BasisService, "GetBasis", { criterion });
rowsOf(reply.conditional[0].rows).forEach((row, i) => {
  const status = reply.images[i];
  // each column belongs to one text; the largest value is the text that fits best
  const best = info.texts[row.indexOf(Math.max(...row))];
  console.log(`${files[i]}\t${status.code === "CODE_OK" ? best : status.message}`);
});
