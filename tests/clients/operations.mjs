// Calls every method of npm openai that sends a request; prints each request and its outcome.
import OpenAI, { AzureOpenAI, APIError, toFile } from 'openai'
import { APIResource } from 'openai/core/resource'

const [url, key, mode] = process.argv.slice(2)
const sent = []
const recording = (input, init) => {
  if (String(input).startsWith('http')) sent.push({ method: (init?.method ?? 'GET').toUpperCase(), path: new URL(String(input)).pathname })
  return fetch(input, init)
}
const common = { apiKey: key, maxRetries: 0, fetch: recording }
const client = mode === 'azure'
  ? new AzureOpenAI({ endpoint: url, apiVersion: '2024-10-21', adminAPIKey: key, ...common })
  : new OpenAI({ baseURL: mode === 'plain' ? `${url}/v1` : `${url}/openai/v1`, adminAPIKey: key, ...common })

const SENDS = /this\._client\s*\.(get|post|put|patch|delete|getAPIList|request)\(|createEmbedding\(this\._client/

function * methods (resource, name, seen = new Set()) {
  if (seen.has(resource)) return
  seen.add(resource)
  if (resource !== client) {
    for (const method of Object.getOwnPropertyNames(Object.getPrototypeOf(resource))) {
      const made = resource[method]
      if (method !== 'constructor' && typeof made === 'function' && SENDS.test(made.toString())) {
        yield [name + method, resource, made]
      }
    }
  }
  for (const [attribute, value] of Object.entries(resource)) {
    if (value instanceof APIResource) yield * methods(value, `${name}${attribute}.`, seen)
  }
}

async function argumentsOf (call, method) {
  const source = method.toString()
  const names = source.slice(source.indexOf('(') + 1).split(')')[0].split(',').map((part) => part.trim().split(/[ =]/)[0])
  const made = []
  for (const name of names.filter(Boolean)) {
    if (name === 'options') continue
    if (!['body', 'params', 'query'].includes(name)) {
      made.push(`${name}-1`)
      continue
    }
    const content = { model: 'gpt-4o', messages: [], session: { type: 'realtime', model: 'gpt-4o' }, purpose: 'assistants' }
    // Parameters that a method removes go into the path.
    for (const [, taken] of source.matchAll(new RegExp(`const \\{([^}]*)\\} = ${name}`, 'g'))) {
      for (const id of taken.split(',').map((part) => part.trim())) {
        if (/^[a-z_]+$/.test(id) && !(id in content)) content[id] = `${id}-1`
      }
    }
    if (/multipart/i.test(source)) {
      content.file = content.image = await toFile(Buffer.from('{}'), 'a.jsonl')
      if (!call.startsWith('realtime')) delete content.session
      delete content.messages
    }
    made.push(content)
  }
  return made
}

const calls = []
for (const [name, resource, method] of methods(client, '')) {
  sent.length = 0
  const call = { name, status: 200, message: '' }
  try {
    await method.apply(resource, await argumentsOf(name, method))
  } catch (error) {
    if (!(error instanceof APIError) || !error.status) throw new Error(`${name}: ${error.stack}`)
    call.status = error.status
    call.message = error.message
  }
  if (!sent.length) throw new Error(`${name} sent nothing`)
  calls.push({ ...call, ...sent[0] })
}
console.log(JSON.stringify(calls))
