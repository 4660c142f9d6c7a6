// Holds resources of External Secrets against that operator's own model; Node runs it.
//
//   node deploy/models.mjs build/models build/render/every-document.yaml
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const API = "external-secrets.io/v1";
const KINDS = ["ExternalSecret", "SecretStore"];
const MODELS = "node_modules/@kubernetes-models/external-secrets/_schemas";
const PREFIX = "ComGithubExternalSecretsExternalSecretsApisExternalsecretsV1";

// What is read of a value is taken out of `unread`. A model passes over what it does not know: what
// it has never read was misspelt.
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const children = new Map();
  for (const key of Object.keys(value)) {
    unread.add(`${path}.${key}`);
  }
  return new Proxy(value, {
    get(target, key) {
      if (!Object.hasOwn(target, key) || typeof key === "symbol") return target[key];
      if (!children.has(key)) {
        unread.delete(`${path}.${key}`);
        children.set(key, watched(target[key], `${path}.${key}`, unread));
      }
      return children.get(key);
    },
  });
}

const [directory, file] = process.argv.slice(2);
let found = false;
for (const text of readFileSync(file, "utf8").split("\n---\n")) {
  const document = JSON.parse(text);
  if (document.apiVersion !== API || !KINDS.includes(document.kind)) continue;
  const model = resolve(join(directory, MODELS, `${PREFIX}${document.kind}.js`));
  const { validate } = await import(pathToFileURL(model));
  const name = `${document.kind}/${document.metadata.name}`;
  const unread = new Set();
  const problems = validate(watched(document, name, unread))
    ? []
    : validate.errors.map((each) => `${name}${each.instancePath}: ${JSON.stringify(each.params)}`);
  for (const problem of [...problems, ...[...unread].map((path) => `${path}: is no field`)]) {
    console.log(problem);
    found = true;
  }
}
process.exit(found ? 1 : 0);
