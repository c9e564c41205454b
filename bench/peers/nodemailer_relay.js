// A relay of smtp-server and nodemailer: collects a message, sends it over a pool, answers what came of it.
// node nodemailer_relay.js MODULES PORT UPSTREAM_PORT POOL
const [modules, ...numbers] = process.argv.slice(2)
const [port, upstream, pool] = numbers.map(Number)
const { SMTPServer } = require(`${modules}/smtp-server`)
const { createTransport } = require(`${modules}/nodemailer`)

const transport = createTransport({
  host: '127.0.0.1',
  port: upstream,
  name: 'relay.bench',
  secure: false,
  ignoreTLS: true,
  pool: true,
  maxConnections: pool,
  maxMessages: Infinity,
})

const server = new SMTPServer({
  name: 'relay.bench',
  authOptional: true,
  disabledCommands: ['AUTH', 'STARTTLS'],
  disableReverseLookup: true,
  logger: false,
  onData(stream, session, callback) {
    const parts = []
    stream.on('data', (part) => parts.push(part))
    stream.on('end', () => {
      const { mailFrom, rcptTo } = session.envelope
      const envelope = { from: mailFrom.address, to: rcptTo.map((one) => one.address) }
      transport.sendMail({ envelope, raw: Buffer.concat(parts) }, (error) => {
        if (error) callback(Object.assign(error, { responseCode: error.responseCode || 451 }))
        else callback(null, 'relayed')
      })
    })
  },
})
server.on('error', (error) => console.error(error.message))
server.server.listen({ port, host: '127.0.0.1', backlog: 1024 })
process.on('SIGTERM', () => process.exit(0))
