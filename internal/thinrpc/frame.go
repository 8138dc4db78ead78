package thinrpc

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	frameHeader = 9
	maxFrame    = 16 << 10 // of either side (RFC 9113 section 4.2: what everybody may send)
	firstWindow = 64<<10 - 1
	maxHeaders  = 8 << 10 // of one request, as RFC 9113 section 6.5.2 counts
	readSize    = 2*maxFrame + frameHeader
)

// appendFrame appends a frame.
func appendFrame(b []byte, t http2.FrameType, flags http2.Flags, stream uint32, payload ...byte) []byte {
	b = appendFrameHeader(b, len(payload), t, flags, stream)
	return append(b, payload...)
}

func appendFrameHeader(b []byte, length int, t http2.FrameType, flags http2.Flags, stream uint32) []byte {
	b = append(b, byte(length>>16), byte(length>>8), byte(length), byte(t), byte(flags))
	return binary.BigEndian.AppendUint32(b, stream)
}

func appendSetting(b []byte, id http2.SettingID, v uint32) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(id))
	return binary.BigEndian.AppendUint32(b, v)
}

func appendWindow(b []byte, stream, n uint32) []byte {
	return appendFrame(b, http2.FrameWindowUpdate, 0, stream, binary.BigEndian.AppendUint32(nil, n)...)
}

func appendReset(b []byte, stream uint32, code http2.ErrCode) []byte {
	return appendFrame(b, http2.FrameRSTStream, 0, stream, binary.BigEndian.AppendUint32(nil, uint32(code))...)
}

func appendGoAway(b []byte, last uint32, code http2.ErrCode, why string) []byte {
	p := binary.BigEndian.AppendUint32(nil, last)
	p = binary.BigEndian.AppendUint32(p, uint32(code))
	return appendFrame(b, http2.FrameGoAway, 0, 0, append(p, why...)...)
}

// appendField appends a header field that is never put into a table (RFC 7541 section 6.2.3): tables cost memory.
func appendField(b []byte, name, value string) []byte {
	b = append(b, 0x10)
	b = append(appendInt(b, len(name)), name...)
	return append(appendInt(b, len(value)), value...)
}

// appendInt appends an integer with a prefix of 7 bits (RFC 7541 section 5.1).
func appendInt(b []byte, n int) []byte {
	if n < 127 {
		return append(b, byte(n))
	}
	b = append(b, 127)
	for n -= 127; n >= 128; n >>= 7 {
		b = append(b, byte(n)|128)
	}
	return append(b, byte(n))
}

// statusOK is the field :status: 200, by its place in the static table.
const statusOK = 0x88

// appendResponse appends the headers of an answer.
func appendResponse(b []byte, stream uint32) []byte {
	p := appendField([]byte{statusOK}, "content-type", "application/grpc")
	return appendFrame(b, http2.FrameHeaders, http2.FlagHeadersEndHeaders, stream, p...)
}

// appendTrailers appends the end of an answer. bare: there were no headers.
func appendTrailers(b []byte, stream uint32, bare bool, err error) []byte {
	var p []byte
	if bare {
		p = appendField([]byte{statusOK}, "content-type", "application/grpc")
	}
	st := toStatus(err)
	p = appendField(p, "grpc-status", strconv.Itoa(int(st.Code())))
	if m := st.Message(); m != "" {
		p = appendField(p, "grpc-message", escape(m))
	}
	if len(st.Proto().GetDetails()) > 0 {
		if d, err := proto.Marshal(st.Proto()); err == nil && len(d) <= maxText {
			p = appendField(p, "grpc-status-details-bin", base64.RawStdEncoding.EncodeToString(d))
		}
	}
	return appendFrame(b, http2.FrameHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, stream, p...)
}

func toStatus(err error) *status.Status {
	if st, ok := status.FromError(err); ok {
		return st
	}
	return status.FromContextError(err)
}

// maxText is how much of an error a caller is told: it has to fit into a frame.
const maxText = 4 << 10

// escape percent-encodes the text of an error.
func escape(m string) string {
	m = m[:min(len(m), maxText)]
	var s strings.Builder
	for i := range len(m) {
		if c := m[i]; c >= ' ' && c <= '~' && c != '%' {
			s.WriteByte(c)
		} else {
			fmt.Fprintf(&s, "%%%02X", c)
		}
	}
	return s.String()
}

// parseTimeout reads the field grpc-timeout: at most 8 digits and a unit.
func parseTimeout(v string) (time.Duration, error) {
	units := map[byte]time.Duration{
		'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
	}
	if len(v) < 2 || len(v) > 9 {
		return 0, status.Errorf(codes.Internal, "grpc-timeout %q: want 1 to 8 digits and a unit", v)
	}
	unit, ok := units[v[len(v)-1]]
	n, err := strconv.ParseUint(v[:len(v)-1], 10, 32)
	if !ok || err != nil {
		return 0, status.Errorf(codes.Internal, "grpc-timeout %q: want 1 to 8 digits and one of HMSmun", v)
	}
	return time.Duration(min(n, uint64(1<<62)/uint64(unit))) * unit, nil
}
