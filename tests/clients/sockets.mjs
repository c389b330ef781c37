// npm's `ws`: frames both ways, close codes, a slow reader, lost connections, and the SDK's realtime client.
import OpenAI from 'openai'
import { OpenAIRealtimeWS } from 'openai/realtime/ws'
import { setTimeout as sleep } from 'node:timers/promises'
import WebSocket from 'ws'

const [url, key, which] = process.argv.slice(2)
const address = `${url.replace('http', 'ws')}/v1/realtime?model=gpt-4o`
const open = (options = {}) => new Promise((resolve, reject) => {
  const socket = new WebSocket(address, options.protocols ?? [], { headers: options.protocols ? {} : { Authorization: `Bearer ${key}` } })
  socket.once('open', () => resolve(socket))
  socket.once('error', reject)
})
const closed = (socket) => new Promise((resolve) => socket.once('close', (code, reason) => resolve({ code, reason: String(reason) })))

const parts = {
  async frames () {
    const socket = await open()
    const count = 10000
    const wrong = []
    let received = 0
    const done = new Promise((resolve) => {
      socket.on('message', (data, binary) => {
        const expected = received % 2 ? Buffer.alloc(received % 3000, received) : `${received}:${'x'.repeat(received % 3000)}`
        if (binary !== Boolean(received % 2) || Buffer.compare(data, Buffer.from(expected))) wrong.push(received)
        received += 1
        if (received === count) resolve()
      })
    })
    for (let number = 0; number < count; number++) {
      socket.send(number % 2 ? Buffer.alloc(number % 3000, number) : `${number}:${'x'.repeat(number % 3000)}`)
    }
    await done
    const ponged = new Promise((resolve) => socket.once('pong', (data) => resolve(String(data))))
    socket.ping('there?')
    const pong = await ponged
    socket.close(4001, 'enough')
    return { received, wrong, pong, ...(await closed(socket)) }
  },
  async slow () {
    const socket = await open()
    let size = 0
    socket.on('message', (data) => { size += data.length })
    const sent = 'y'.repeat(100000)
    socket.pause()
    for (let number = 0; number < 300; number++) socket.send(sent)
    await sleep(500)
    const before = size
    socket.resume()
    while (size < 300 * sent.length) await sleep(10)
    socket.close(1000)
    return { before, size, ...(await closed(socket)) }
  },
  async browser () {
    const socket = await open({ protocols: ['realtime', `openai-insecure-api-key.${key}`, 'openai-beta.realtime-v1'] })
    socket.close(1000)
    return { protocol: socket.protocol, ...(await closed(socket)) }
  },
  async hangup () {
    const socket = await open()
    socket.terminate()
    return await closed(socket)
  },
  async refused () {
    const socket = new WebSocket(address, { headers: { Authorization: 'Bearer wrong' } })
    return await new Promise((resolve) => socket.once('unexpected-response', (_, answer) => resolve({ status: answer.statusCode })))
  },
  async many () {
    const sockets = await Promise.all(Array.from({ length: 200 }, () => open()))
    const echoes = await Promise.all(sockets.map((socket, number) => new Promise((resolve) => {
      socket.once('message', (data) => resolve(String(data) === String(number)))
      socket.send(String(number))
    })))
    const ends = sockets.map(closed)
    sockets.forEach((socket, number) => number % 2 ? socket.terminate() : socket.close(1000))
    await Promise.all(ends)
    return { right: echoes.filter(Boolean).length }
  },
  async sdk () {
    const client = new OpenAI({ apiKey: key, baseURL: `${url}/v1` })
    const realtime = new OpenAIRealtimeWS({ model: 'gpt-4o' }, client)
    let text = ''
    return await new Promise((resolve, reject) => {
      realtime.on('error', reject)
      realtime.on('session.created', () => realtime.send({ type: 'response.create' }))
      realtime.on('event', (event) => {
        if (event.type === 'response.output_text.delta') text += event.delta
        if (event.type === 'response.done') { realtime.close(); resolve({ text }) }
      })
    })
  }
}
console.log(JSON.stringify(await parts[which]()))
process.exit(0)
